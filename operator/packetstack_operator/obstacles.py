"""Why a pod of an engine does not run: what schedulers, kubelets and device plugins say, as reasons. Pure."""

import re
from collections.abc import Mapping

from packetstack_core.reasons import ConditionReason, Problem
from packetstack_operator import observing
from packetstack_operator.observing import Raw

_CANNOT_START = (
    ConditionReason.CREATE_CONTAINER_CONFIG_ERROR,
    ConditionReason.CREATE_CONTAINER_ERROR,
    ConditionReason.RUN_CONTAINER_ERROR,
)
"""What the kubelet says of a container that it cannot start; the conditions have the same reasons."""


def unschedulable_since(pod: Raw) -> float | None:
    """Unix time since which the scheduler finds no node for it; None if it has one, or was not tried."""
    if observing.node_of(pod) is not None:
        return None
    for c in pod.get("status", {}).get("conditions") or ():
        if c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable":
            return observing.seconds(c["lastTransitionTime"]) if c.get("lastTransitionTime") else 0.0
    return None


def obstacle(pod: Raw) -> Problem | None:
    """What a pod that does not run waits for, if it is something that is missing."""
    name = pod["metadata"]["name"]
    status = pod.get("status", {})
    for c in status.get("conditions") or ():
        unscheduled = c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable"
        if unscheduled and observing.node_of(pod) is None:
            message = str(c.get("message") or "")
            return _shortage(message), f"pod {name}: {message}"
    for c in status.get("containerStatuses") or ():
        waiting = (c.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            return (
                ConditionReason.IMAGE_PULL_FAILED,
                f"pod {name}: image {c.get('image')}: {waiting.get('message') or reason}",
            )
        if reason in _CANNOT_START:
            return ConditionReason(reason), f"pod {name}: {waiting.get('message') or reason}"
    return None


def _shortage(message: str) -> ConditionReason:
    """The reason in a scheduler's message."""
    lacking = re.findall(r"Insufficient ([\w./-]+)", message)
    for resource in lacking:
        resource = resource.rstrip(".")
        if resource.startswith("hugepages-"):
            return ConditionReason.NO_HUGE_PAGES
        if "/" in resource:
            return ConditionReason.NO_FREE_VF
    if "cannot allocate all claims" in message or "resourceclaim" in message.lower():
        return ConditionReason.NO_FREE_VF
    if any(r.rstrip(".") == "cpu" for r in lacking):
        return ConditionReason.NO_EXCLUSIVE_CPU
    if any(r.rstrip(".") == "memory" for r in lacking):
        return ConditionReason.NO_MEMORY
    return ConditionReason.UNSCHEDULABLE


def admission(reason: str, message: str) -> ConditionReason:
    """The reason in a kubelet's refusal."""
    if reason == "TopologyAffinityError":
        return ConditionReason.TOPOLOGY_REJECTED
    if reason == "OutOfcpu" or (reason == "UnexpectedAdmissionError" and "cpu" in message.lower()):
        return ConditionReason.NO_EXCLUSIVE_CPU
    if reason.startswith("OutOfhugepages"):
        return ConditionReason.NO_HUGE_PAGES
    if reason.startswith("OutOf") and "/" in reason:
        return ConditionReason.NO_FREE_VF
    if reason == "UnexpectedAdmissionError":
        return ConditionReason.DEVICE_NOT_READY
    return ConditionReason.NO_MEMORY if reason == "OutOfmemory" else ConditionReason.ENGINE_FAILED


def trouble(name: str, message: str) -> Problem:
    """What the kubelet says about a pod that it cannot start. That is in no status, only in events."""
    if re.search(r"network-attachment-definition", message, re.IGNORECASE):
        return ConditionReason.ATTACHMENT_NOT_FOUND, f"pod {name}: {message}"
    return ConditionReason.POD_NOT_STARTED, f"pod {name}: {message}"


def of_pod(pod: Raw, troubles: Mapping[str, str]) -> Problem | None:
    """What keeps a pod from running. `troubles`: the kubelet's last warning by name of a pod."""
    name = str(pod["metadata"]["name"])
    found = obstacle(pod)
    return found if found is not None or name not in troubles else trouble(name, troubles[name])
