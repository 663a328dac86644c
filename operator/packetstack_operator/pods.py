"""What the operator makes for a stack: engine pods, PacketEngine objects, a disruption budget. Pure."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from packetstack_core import kinds
from packetstack_core.engines import Engine
from packetstack_core.kinds import TableEngine
from packetstack_core.resources import API_VERSION, KIND, PacketStack
from packetstack_core.values import quantity

STACK = "packetstack.io/stack"
ENGINE = "packetstack.io/engine"
ENGINE_STATE = "packetstack.io/engine-state"
REVISION = "packetstack.io/revision"
SHAPE = "packetstack.io/shape"
"""Annotation of a pod: its queues, cores, CPU policy and set, so that a lost flow table can be made again."""
DATA_PATH = "packetstack.io/DataPath"
"""Condition of a pod: the agent says that packets pass through it."""
NETWORKS = "k8s.v1.cni.cncf.io/networks"

CONTAINER = "engine"
DIRECTORY = "/run/packetstack-engine"
HOST_DIRECTORY = "/run/packetstack/engines"
INTERFACE = "net1"
PORT = 9471
"""Where the supervisor serves /metrics and /healthz."""
NOBODY = 65534
GRACE_SECONDS = 60
"""A pod that is deleted by somebody else has this long to hand its buckets over."""


def template(engine: Engine, image: str) -> str:
    """Differs when engines must be replaced: another shape, or another image. Hexadecimal digits."""
    return hashlib.sha256(f"{engine.template_hash()} {engine.image or image}".encode()).hexdigest()[:10]


def selector(stack: str) -> str:
    """Label selector of the pods of active engines, for an autoscaler."""
    return f"{STACK}={stack},{ENGINE_STATE}=Active"


def owner(stack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`ownerReferences` of what belongs to a stack (as the API server gives it)."""
    meta = stack["metadata"]
    reference = {"apiVersion": API_VERSION, "kind": KIND, "name": meta["name"], "uid": meta["uid"], "controller": True}
    return [reference]


def pod_labels(stack: str, engine: TableEngine, state: str) -> dict[str, str]:
    """Labels that the operator keeps on an engine's pod."""
    own = {ENGINE: str(engine.id), ENGINE_STATE: state, REVISION: engine.template}
    return kinds.labels(stack) | own


def pod(
    raw: Mapping[str, Any], stack: PacketStack, shape: Engine, engine: TableEngine, image: str, node: str | None
) -> dict[str, Any]:
    """The pod of an engine. `raw`: the stack as the API server gives it. `node`: where it must run; None is anywhere."""
    custom = shape.pod_template
    annotations = {**custom.metadata.annotations, SHAPE: _shape(engine)}
    resources = _resources(shape)
    extra: dict[str, Any] = {}
    attachment = shape.interface.attachment or shape.interface.device_plugin
    if attachment is not None:
        annotations[NETWORKS] = json.dumps([_network(attachment.network_attachment_definition, stack)])
    if shape.interface.device_plugin is not None:
        for part in ("requests", "limits"):
            resources[part][shape.interface.device_plugin.resource_name] = "1"
    if shape.interface.resource_claim is not None:
        name = shape.interface.resource_claim.resource_claim_template_name
        extra["resourceClaims"] = [{"name": "interface", "resourceClaimTemplateName": name}]
        resources["claims"] = [{"name": "interface"}]
    if custom.priority_class_name:
        extra["priorityClassName"] = custom.priority_class_name
    if custom.service_account_name:
        extra["serviceAccountName"] = custom.service_account_name
    if custom.node_selector:
        extra["nodeSelector"] = custom.node_selector
    if custom.tolerations:
        extra["tolerations"] = list(custom.tolerations)
    if custom.topology_spread_constraints:
        extra["topologySpreadConstraints"] = list(custom.topology_spread_constraints)
    affinity = _affinity(custom.affinity, node)
    if affinity:
        extra["affinity"] = affinity

    host = f"{HOST_DIRECTORY}/{kinds.pod_directory(stack.metadata.namespace, engine.name)}"
    volumes: list[dict[str, Any]] = [{"name": "run", "hostPath": {"path": host, "type": "DirectoryOrCreate"}}]
    mounts = [{"name": "run", "mountPath": DIRECTORY}]
    if shape.huge_pages is not None:
        volumes.append({"name": "hugepages", "emptyDir": {"medium": f"HugePages-{shape.huge_pages.page_size}"}})
        mounts.append({"name": "hugepages", "mountPath": "/dev/hugepages"})
    container = {
        "name": CONTAINER,
        "image": shape.image or image,
        "command": ["packetstack-engine"],
        "args": ["--pod", "--directory", DIRECTORY, "--listen", f":{PORT}"],
        "ports": [{"name": "metrics", "containerPort": PORT}],
        "resources": resources,
        "volumeMounts": mounts,
        "readinessProbe": {
            "httpGet": {"path": "/healthz", "port": "metrics"},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
        },
        # Sockets and programs are the agent's: it hands descriptors over, and nothing here needs a privilege.
        "securityContext": {
            "runAsUser": NOBODY,
            "runAsGroup": NOBODY,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": engine.name,
            "namespace": stack.metadata.namespace,
            "labels": {**custom.metadata.labels, **pod_labels(stack.name, engine, engine.state)},
            "annotations": annotations,
            "ownerReferences": owner(raw),
        },
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "readinessGates": [{"conditionType": DATA_PATH}],
            **extra,
        },
    }


def _shape(engine: TableEngine) -> str:
    shape = {"queues": engine.queues, "cores": engine.cores, "cpuPolicy": engine.cpu_policy}
    return json.dumps(shape if engine.set is None else {**shape, "set": engine.set})


def network(raw: Mapping[str, Any]) -> str | None:
    """Name of the network attachment that gives this pod its interface, `namespace/name`. None: it has none."""
    text = raw["metadata"].get("annotations", {}).get(NETWORKS)
    if not text:
        return None
    try:
        return next(f"{n['namespace']}/{n['name']}" for n in json.loads(text) if n.get("interface") == INTERFACE)
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration):
        return ""


def _network(name: str, stack: PacketStack) -> dict[str, str]:
    namespace, slash, short = name.rpartition("/")
    return {"name": short, "namespace": namespace if slash else stack.metadata.namespace, "interface": INTERFACE}


def _resources(shape: Engine) -> dict[str, Any]:
    limits = {"memory": shape.memory}
    if shape.cpu_policy == "Exclusive":
        # Equal to the requests, in whole cores: what the kubelet's static CPU manager asks for.
        limits["cpu"] = str(shape.cores)
        requests = dict(limits)
    else:
        least = min(quantity(shape.memory), quantity("64Mi"))
        requests = {"cpu": f"{10 * shape.cores}m", "memory": str(int(least))}
    if shape.huge_pages is not None:
        limits[f"hugepages-{shape.huge_pages.page_size}"] = shape.huge_pages.size
        requests[f"hugepages-{shape.huge_pages.page_size}"] = shape.huge_pages.size
    return {"requests": requests, "limits": limits}


def _affinity(custom: Mapping[str, Any], node: str | None) -> dict[str, Any]:
    """The user's affinity, and the stack's node in each of its alternatives (they are joined by "or")."""
    affinity: dict[str, Any] = json.loads(json.dumps(custom))
    if node is not None:
        at = {"key": "metadata.name", "operator": "In", "values": [node]}
        required = affinity.setdefault("nodeAffinity", {}).setdefault(
            "requiredDuringSchedulingIgnoredDuringExecution", {}
        )
        terms = required.get("nodeSelectorTerms") or [{}]
        required["nodeSelectorTerms"] = [{**t, "matchFields": [*t.get("matchFields", []), at]} for t in terms]
    return affinity


def packet_engine(raw: Mapping[str, Any], name: str, number: int) -> dict[str, Any]:
    """The PacketEngine of engine `number`, whose pod is called `name`; without its status."""
    meta = raw["metadata"]
    return {
        "apiVersion": API_VERSION,
        "kind": "PacketEngine",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {**kinds.labels(meta["name"]), ENGINE: str(number)},
            "ownerReferences": owner(raw),
        },
        "spec": {"stack": meta["name"], "id": number},
    }


def budget_name(stack: str) -> str:
    """Name of a stack's disruption budget. Not the stack's name, which a user's own budget is likely to have."""
    return f"{stack}-engines"


def disruption_budget(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One engine at a time may be evicted: an eviction is a handover, and the next waits until another is active.

    Only active engines count. Protecting all of them for good would stop upgrades of nodes.
    """
    meta = raw["metadata"]
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": budget_name(meta["name"]),
            "namespace": meta["namespace"],
            "labels": kinds.labels(meta["name"]),
            "ownerReferences": owner(raw),
        },
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": {STACK: meta["name"], ENGINE_STATE: "Active"}},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
