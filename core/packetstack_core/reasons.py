"""Reasons of events and conditions: each with what it means and what a person does about it.

`docs/troubleshoot.md` shows them in tables that are made from here: `python -m packetstack_core.reasons FILE` writes
them between the markers of a document again.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Literal, Self

MODULE = "packetstack_core.reasons"

Kind = Literal["Normal", "Warning"]
"""Types of Kubernetes' events."""
Value = Literal["True", "False", "Unknown"]
"""Statuses of Kubernetes' conditions."""


class EventReason(StrEnum):
    """Why an event is shown. An event that announces a condition has that condition's reason instead."""

    kind: Kind
    meaning: str
    """What happened, and what becomes of packets."""
    remedy: str
    """What to do; empty: nothing."""

    def __new__(cls, name: str, kind: Kind, meaning: str, remedy: str = "") -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.kind, member.meaning, member.remedy = kind, meaning, remedy
        return member

    # fmt: off
    # ---- engines
    DATAPATH_DIED = (
        "DatapathDied", "Warning",
        "an engine's process ended. Another one goes on with its queues, some 10 ms later",
        "`packetstack logs SLOT` says how it ended")
    ENGINE_HUNG = (
        "EngineHung", "Warning",
        "a core was stopped, needed 0.08 s of CPU time for one turn of its loop or waited in the kernel for 0.5 s, or an engine did not answer four "
        "fences in a row. Its process was killed, and another goes on with its queues, some 20 ms later",
        "if it comes again: `packetstack logs SLOT`, load of the machine")
    ENGINE_DOES_NOT_ANSWER = (
        "EngineDoesNotAnswer", "Warning",
        "a fence was not answered within 0.5 s. Nothing is released until it is: the buckets that move are parked, bounded",
        "it is tried again; see `EngineHung`")
    ENGINE_RESTARTED = (
        "EngineRestarted", "Warning",
        "the engine's init ended, or brought no datapath for 3 s; another init was started in its namespace",
        "find out who killed it")
    ENGINE_LOST = (
        "EngineLost", "Warning",
        "the engine's interface, or the descriptors of its queues, are gone. It is made again under its slot, with its buckets and flows. "
        "In a cluster its pod is gone, or no datapath has served for `spec.repair.replaceAfterSeconds`: others take its buckets, and another engine is made",
        "find out who removed it")
    ENGINE_FAILED = (
        "EngineFailed", "Warning",
        "an engine could not be made; see the condition `CapacityAvailable`",
        "do what the message says")
    DATAPATH_REFUSED = (
        "DatapathRefused", "Warning",
        "a process on an engine's socket was not let in; the engine that serves goes on",
        "see `LayoutMismatch` below; anything else is not ours")
    PACKET_DROPPED = (
        "PacketDropped", "Warning",
        "a packet ended the datapath twice and was dropped. `packetstack get NAME -o yaml` shows its first bytes under `captures`",
        "report it: that is a bug")
    ENGINE_CREATED = ("EngineCreated", "Normal", "a pod of an engine is being made")
    ENGINE_READY = ("EngineReady", "Normal", "an engine's datapath serves its queues")
    ENGINE_ACTIVE = ("EngineActive", "Normal", "an engine is in the flow table, and gets its share of the buckets")
    ENGINE_DRAINING = ("EngineDraining", "Normal", "an engine hands its buckets over, with their flows, and will be removed")
    ENGINE_REMOVED = ("EngineRemoved", "Normal", "an engine owned no bucket any more and is gone")
    ENGINE_UPGRADED = ("EngineUpgraded", "Normal", "another process goes on with an engine's queues, after the pause that is named")
    # ---- sets of engines
    SET_ACTIVATING = ("SetActivating", "Normal", "a second set of engines is being made; the present one serves until it is ready")
    SET_CURRENT = ("SetCurrent", "Normal", "the second set takes new connections; the one before it keeps those that it has")
    BUCKETS_SWITCHED = ("BucketsSwitched", "Normal", "the traffic of these buckets is mirrored to both sets from now on")
    SET_ENDED = (
        "SetEnded", "Warning",
        "connections of the set before were left at the deadline (`spec.handover.deadlineSeconds`), and were ended as `onDeadline` says",
        "nothing, or a longer deadline")
    SET_RETIRED = ("SetRetired", "Normal", "the set before has no connection any more; its engines and memory are gone")
    # ---- buckets and queues
    ELEPHANT = (
        "Elephant", "Warning",
        "a bucket, so most likely one flow, takes more than 80 % of a core alone. It has its core almost to itself, and no move of buckets helps it",
        "a faster core; if it is many flows, more buckets in a new stack")
    BUCKETS_MOVED = ("BucketsMoved", "Normal", "buckets got other owners, with their flows")
    REBALANCED = ("Rebalanced", "Normal", "buckets were given to other cores by load")
    REBALANCE_ADVICE = ("RebalanceAdvice", "Normal", "`spec.rebalance.mode: Advice`: what would be moved")
    QUEUES_REBALANCED = ("QueuesRebalanced", "Normal", "queues were given to other cores of their engine, by load")
    QUEUE_MOVED = ("QueueMoved", "Normal", "a queue was given to another core by `packetstack move`")
    # ---- a stack and its resource
    NAME_TAKEN = (
        "NameTaken", "Warning", "a pod of somebody else is called `<stack>-<number>`. The engine gets another number")
    NODE_LOST = (
        "NodeLost", "Warning",
        "the node of a stack has none of its engines and takes none for 30 s, so that the stack goes to another. Its flows were on that node",
        "see why the scheduler took no pod there: taints, a cordon, resources")
    ADDRESS_LEAVING = (
        "AddressLeaving", "Normal", "a SNAT address was removed while flows have it: they keep it, new ones do not get it")
    ADDRESS_RELEASED = ("AddressReleased", "Normal", "no flow has a SNAT address that was removed any more")
    CREATED = ("Created", "Normal", "a stack was made")
    CHANGED = ("Changed", "Normal", "a stack's resource was changed, and is carried out")
    SCALED = ("Scaled", "Normal", "`packetstack scale` changed the number of engines")
    DELETED = ("Deleted", "Normal", "a stack was removed, with the flows that it had")
    # ---- the agent and its node
    LAYOUT_MISMATCH = (
        "LayoutMismatch", "Warning",
        "another version made the stacks of this node, with another memory layout. They serve on; this agent stands by and touches nothing",
        "when flows may end: `kubectl packetstack upgrade STACK --end-flows`")
    RECORD_UNREADABLE = (
        "RecordUnreadable", "Warning",
        "an agent of another version wrote what `state.json` says about this stack, or a file of the stack is damaged. "
        "The stack is left alone: its engines serve, but nothing follows them if they die. Other stacks go on",
        "start the agent that wrote it; or `packetstack down --all`, then `packetstack-agent --clean`, which ends that stack too")
    RECORD_NOT_WRITTEN = (
        "RecordNotWritten", "Warning",
        "`state.json` cannot be written. Packets go on; nothing that has to be recorded is made",
        "make room, or make the file system writable; it is tried every second")
    RECORD_WRITTEN = ("RecordWritten", "Normal", "`state.json` is written again")
    AGENT_STARTED = ("AgentStarted", "Normal", "an agent started and took over the engines that were there")
    API_SERVER_LOST = (
        "ApiServerLost", "Warning",
        "the API server cannot be reached. Packets and engines go on by the last flow tables; nothing is resized",
        "see the API server")
    FLOW_TABLE_REFUSED = (
        "FlowTableRefused", "Warning",
        "the agent cannot follow a stack's `FlowTable`, for the reason given. It goes on by the last one, and tries again every 5 s",
        "do what the message says")
    FLOW_TABLE_LOST = (
        "FlowTableLost", "Warning",
        "a `FlowTable` was deleted while its engines run. They go on for 60 s: the operator writes it anew",
        "find out who deleted it; delete the `PacketStack` to end a stack")
    UPLINK_FAILED = (
        "UplinkFailed", "Warning",
        "the director does not run on this uplink. Packets come by the routed pair, a little slower",
        "do what the message says")
    DIRECTOR_ATTACHED = (
        "DirectorAttached", "Warning", "the director was put back on a link that came, went or was made anew")
    PATH_RESTORED = (
        "PathRestored", "Warning",
        "something that the agent has made for packets between the node and an engine was taken away or changed, and is as it was again. "
        "The message says what",
        "find out who does it; see [what packets need](#what-packets-need)")
    PATH_OPEN = ("PathOpen", "Normal", "what the node lacked for packets of the stack is there again")
    UPLINK_RENAMED = ("UplinkRenamed", "Normal", "an uplink has another name; the director runs on it as before, and the record has its new name")
    ROUTES_RESTORED = (
        "RoutesRestored", "Warning",
        "routes to the stack's addresses were missing and were added. Meanwhile packets did not reach it, but by uplinks",
        "find out who removes them")
    ROUTES_FAILED = (
        "RoutesFailed", "Warning", "routes to the stack's addresses cannot be added: packets do not reach it, but by uplinks",
        "do what the message says; it is tried again")
    FIREWALL_RESTORED = (
        "FirewallRestored", "Warning",
        "rules of the agent in the node's packet filter were missing, and are there again. For a moment new connections may have failed",
        "find out who flushes the rules of others")
    FIREWALL_IN_THE_WAY = (
        "FirewallInTheWay", "Warning", "the node's packet filter drops packets of stacks, by the rule that is named",
        "see the condition `FirewallOpen`")
    FIREWALL_UNCLEAR = (
        "FirewallUnclear", "Warning", "a rule may drop some packets of stacks, or the rules could not be read",
        "see the condition `FirewallOpen`, reason `MayDropPackets`")
    FIREWALL_FAILED = (
        "FirewallFailed", "Warning", "the node's packet filter could not be looked at, so nobody knows whether it drops packets of stacks",
        "do what the message says")
    FIREWALL_OPEN = ("FirewallOpen", "Normal", "the node's packet filter does not drop packets of stacks any more")
    # ---- backends and clients
    BACKEND_UNHEALTHY = (
        "BackendUnhealthy", "Warning", "a backend does not answer its probes and gets no new flows; those that it has go on",
        "see that backend")
    BACKEND_HEALTHY = ("BackendHealthy", "Normal", "a backend answers its probes again and gets new flows")
    FLOOD_SHED = (
        "FloodShed", "Warning",
        "engines have more to do than they can, and this listener gets more packets of no known flow than its share: `openers` "
        "(TCP SYN, datagrams) or `strays` (acknowledgements, fragments, ICMP errors). What is more is dropped before it reaches an engine. "
        "Known flows and other listeners go on",
        "if they are users: more engines. If not: filter the senders upstream. See [in a flood](operate.md#in-a-flood)")
    FLOOD_ENDED = ("FloodEnded", "Normal", "all packets of no known flow are let through again; how many were dropped")
    # ---- the autoscaler: names of a HorizontalPodAutoscaler, where it has them
    FAILED_COMPUTE = (
        "FailedComputeMetricsReplicas", "Warning", "the autoscaler cannot use any metric, or not without fewer engines; `replicas` stays",
        "see the condition `ScalingActive`")
    FAILED_RESCALE = (
        "FailedRescale", "Warning", "the autoscaler could not write `replicas`", "see the condition `AbleToScale`; it is tried again")
    SELECTOR_REQUIRED = (
        "SelectorRequired", "Warning", "the scale of the stack names no selector", "see the condition `ScalingActive`")
    SUCCESSFUL_RESCALE = ("SuccessfulRescale", "Normal", "the autoscaler wrote `replicas`")
    ENGINES_RESIZED = (
        "EnginesResized", "Normal", "the vertical autoscaler wrote `engine.cores`, or `replicas`; the message has the triggers, and how the change is made")
    RESIZE_REFUSED = (
        "ResizeRefused", "Normal", "a trigger asked for another size, and something stood against it; `VerticalScalingLimited` has the reason")
    AUTOSCALING_PAUSED = ("AutoscalingPaused", "Normal", "`spec.autoscaling.paused`: what the autoscaler would do")
    # ---- anything else
    FAILED = ("Failed", "Warning", "something did not work, and is tried again", "do what the message says; if it stays, report it with `packetstack logs`")
    INTERNAL_ERROR = (
        "InternalError", "Warning", "a bug: a step of the control plane ended in an error, and is tried again. Packets go on",
        "report it with `packetstack logs`")
    # fmt: on


@dataclass(frozen=True, slots=True)
class Says:
    """What a reason means for one condition, `condition` being `status`."""

    condition: str
    status: Value
    meaning: str
    remedy: str = ""
    """What to do; empty: nothing."""

    @property
    def kind(self) -> Kind:
        """Whether that is something that a person should know of. A stack may progress as long as it likes."""
        good = self.condition in NEUTRAL or (self.status == "False") is (self.condition in BAD)
        return "Normal" if good and self.status != "Unknown" else "Warning"


BAD = ("Degraded", "ScalingHeld")
"""Conditions that should not be True."""
NEUTRAL = (
    "Progressing",
    "ScalingLimited",
    "ScaledToZero",
    "VerticalScalingLimited",
    "Ready",
    "packetstack.io/DataPath",
)
"""Conditions that may be either without anything being wrong."""
AUTOSCALER = ("AbleToScale", "ScalingActive", "ScalingLimited", "ScaledToZero")
"""Conditions that a stack has only with `spec.autoscaling`."""
VERTICAL = ("VerticalScalingActive", "VerticalScalingLimited")
"""Conditions that a stack has only with `spec.autoscaling.vertical`."""
ENGINE = ("Ready", "packetstack.io/DataPath")
"""Conditions of a PacketEngine, and of its pod."""

_ENGINES = "make room there, or use fewer or smaller engines"
_SHORT = "the scheduler found no node with enough of it, or the node of the stack has none left: all engines of a stack run on one node"
_SAID = "do what the message says"
_REFUSED = (
    "the kubelet refused the pod after it was placed. It is deleted, and another is tried after 1, 2, 5, 15, 60 s; "
    "there is never more than one"
)
_CONTAINER = "the kubelet cannot start the container, for the reason in the message"
_INVALID = "the resource cannot be carried out. What runs goes on as it was"
_NEEDS = "the message has what helps; see [what packets need](#what-packets-need)"
_FORWARDING = (
    "the node does not forward packets any more, all or those of the interface that the message names: they are lost"
)
_TAKEN = (
    "an address of the stack is one of the node's own, or a network or broadcast address there: its packets are lost"
)
_BROKEN = "something of the agent's own between the node and engines was taken away, and it cannot put it back. The message says what becomes of packets; it is tried again"
_FREE = "nothing holds it back"
_STABLE = "more, or fewer, engines were asked for within the window of `behavior`"
_STABLE_REMEDY = "wait, or a shorter `stabilizationWindowSeconds`"
_UNUSABLE = "the metric, or the selector of the scale, cannot be used"
_LIMITED = "the load asks for more than `maxReplicas`, or fewer than `minReplicas`"
_RATE = "a policy of `behavior` allows no faster change"
_NO_METRIC = "the metrics API gives no answer; without Kubernetes there is none"
_NO_METRIC_REMEDY = "do what the message says; use type `Engine`"


class ConditionReason(StrEnum):
    """Why a condition is as it is. Some reasons are given for more than one condition."""

    says: tuple[Says, ...]

    def __new__(cls, name: str, *says: Says) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.says = says
        return member

    @property
    def kind(self) -> Kind:
        """Type of an event that announces a condition with this reason."""
        return "Warning" if any(s.kind == "Warning" for s in self.says) else "Normal"

    # fmt: off
    # ---- of a stack
    MINIMUM_ENGINES_AVAILABLE = (
        "MinimumEnginesAvailable", Says("Available", "True", "at least one engine serves packets"))
    NO_REPLICAS = (
        "NoReplicas", Says("Available", "False", "`spec.replicas` is 0: packets are dropped as `no_owner`"))
    ENGINES_STARTING = (
        "EnginesStarting",
        Says("Available", "False", "no engine serves yet: packets are dropped as `no_owner`, or wait for their engine", "wait; then `packetstack events`"),
        Says("Progressing", "True", "fewer engines serve than are wanted", "wait"))
    ROLLING_OUT = (
        "RollingOut", Says("Progressing", "True", "engines of an older template or image are being replaced", "wait"))
    HANDOVER_IN_PROGRESS = (
        "HandoverInProgress", Says("Progressing", "True", "buckets move, or engines that have left are being let go", "wait"))
    SET_ACTIVATING = (
        "SetActivating",
        Says("Progressing", "True", "another set of engines comes up, or is removed since it is not wanted any more. The first one serves alone until "
             "each engine of the other is ready", "wait; `CapacityAvailable` says what stands against it"))
    SET_SWITCHING = (
        "SetSwitching", Says("Progressing", "True", "buckets are being switched to another set of engines", "wait"))
    SET_DRAINING = (
        "SetDraining",
        Says("Progressing", "True", "the present set of engines serves. An older one keeps the connections that it had, and goes when they have ended", "wait"),
        Says("ScalingHeld", "True", "what is wanted now waits until the older set has gone",
             "wait; or end its connections: `spec.handover.onDeadline: Reset` with `policy: Hurry`"))
    NOTHING_HELD = ("NothingHeld", Says("ScalingHeld", "False", "nothing that is wanted waits for an older set of engines"))
    PAUSED = (
        "Paused",
        Says("Progressing", "False", "`spec.paused` is set: engines and buckets stay as they are, but for those of an engine that is lost or "
             "evicted; backends are still followed"))
    SETTLED = ("Settled", Says("Progressing", "False", "the pool is what the resource says"))
    ENOUGH_CAPACITY = ("EnoughCapacity", Says("CapacityAvailable", "True", "nothing prevents another engine"))
    ENGINE_FAILED = (
        "EngineFailed",
        Says("CapacityAvailable", "False", "an engine could not be made; the message says why. The others serve on. It is tried again after 1, 2, 5, 15, 60 s", _SAID))
    NO_EXCLUSIVE_CPU = (
        "NoExclusiveCPU",
        Says("CapacityAvailable", "False", "too few CPUs are left. With `cpuPolicy: Exclusive` each core has one of its own; in a cluster " + _SHORT,
             "use fewer engines or cores, or `cpuPolicy: Shared`"))
    NO_MEMORY = ("NoMemory", Says("CapacityAvailable", "False", _SHORT, _ENGINES))
    NO_HUGE_PAGES = ("NoHugePages", Says("CapacityAvailable", "False", _SHORT, _ENGINES))
    NO_FREE_VF = ("NoFreeVF", Says("CapacityAvailable", "False", _SHORT, _ENGINES))
    UNSCHEDULABLE = (
        "Unschedulable",
        Says("CapacityAvailable", "False", "the scheduler puts the pod nowhere, for the reason in the message",
             "taints, node selectors and affinity in `spec.engine.podTemplate`"))
    TOPOLOGY_REJECTED = (
        "TopologyRejected",
        Says("CapacityAvailable", "False", _REFUSED, "the kubelet's topology manager; the device plugin"))
    DEVICE_NOT_READY = (
        "DeviceNotReady",
        Says("CapacityAvailable", "False", _REFUSED, "the kubelet's topology manager; the device plugin"))
    IMAGE_PULL_FAILED = (
        "ImagePullFailed",
        Says("CapacityAvailable", "False", "the kubelet cannot pull the image of the engines; those that run go on", "`spec.engine.image`, pull secrets"))
    ATTACHMENT_NOT_FOUND = (
        "NetworkAttachmentDefinitionNotFound",
        Says("CapacityAvailable", "False", "the attachment that `spec.engine.interface` names is not there", "create it, or name another"))
    POD_NOT_STARTED = (
        "PodNotStarted",
        Says("CapacityAvailable", "False", "the kubelet cannot prepare the pod; the message is its last warning", _SAID))
    CREATE_CONTAINER_CONFIG_ERROR = (
        "CreateContainerConfigError", Says("CapacityAvailable", "False", _CONTAINER, _SAID))
    CREATE_CONTAINER_ERROR = ("CreateContainerError", Says("CapacityAvailable", "False", _CONTAINER, _SAID))
    RUN_CONTAINER_ERROR = ("RunContainerError", Says("CapacityAvailable", "False", _CONTAINER, _SAID))
    POD_REFUSED = (
        "PodRefused",
        Says("CapacityAvailable", "False", "the API server takes no such pod", "the namespace needs `pod-security.kubernetes.io/enforce: privileged`"))
    QUOTA_EXCEEDED = (
        "QuotaExceeded",
        Says("CapacityAvailable", "False", "the namespace's quota allows no further pod", "raise the quota"),
        Says("Degraded", "True", "the namespace's quota allows no further object of the kind that is named. Packets go by the last flow table",
             "raise the quota"))
    WRITE_REFUSED = (
        "WriteRefused",
        Says("Degraded", "True",
             "the API server did not take what the operator wrote, as an admission webhook or a missing right makes it. Packets go by the "
             "last flow table, and the stack is not resized; it is tried again after 1 to 15 s",
             _SAID))
    AS_EXPECTED = ("AsExpected", Says("Degraded", "False", "nothing is wrong"))
    INVALID_SPEC = ("InvalidSpec", Says("Degraded", "True", _INVALID, _SAID), Says("Available", "False", _INVALID, _SAID))
    NOT_SUPPORTED = ("NotSupported", Says("Degraded", "True", _INVALID, _SAID), Says("Available", "False", _INVALID, _SAID))
    NAME_TAKEN = (
        "NameTaken",
        Says("Degraded", "True",
             "the flow table of another stack of this name is still there; or a PodDisruptionBudget that is not of the stack has the name "
             "`<stack>-engines`: the stack serves, but evictions are not held back",
             "wait until the flow table is deleted; rename the budget (looked at again when something changes, or after 5 minutes)"),
        Says("Available", "False", "the stack cannot begin: the flow table of another stack of this name is still there", "wait until it is deleted"))
    ADDRESS_CONFLICT = (
        "AddressConflict",
        Says("Degraded", "True",
             "another stack has the address that the message names. It belongs to the one that packets flow to, else to the oldest; "
             "what runs goes on as it was",
             "use another address"),
        Says("Available", "False", "the stack cannot begin: another stack has the address that the message names", "use another address"))
    LAYOUT_MISMATCH = (
        "LayoutMismatch",
        Says("Degraded", "True",
             "the stack's memory was made by a version with another layout: its engines serve on, and the node's agent stands by. "
             "Or an engine's image is of another version than the agent",
             "when flows may end: the command in the message. Or give engines the agent's image"))
    AGENT_PROBLEM = ("AgentProblem", Says("Degraded", "True", "the agent of the stack's node cannot do something for it; the message is its own. What runs goes on", _SAID))
    DUPLICATE_MAC = (
        "DuplicateMAC",
        Says("Degraded", "True",
             "two engines of a node have interfaces with the same MAC; the younger one does not become active while the older one has it",
             "give each virtual function its own MAC; then delete the younger pod"))
    NO_AGENT = (
        "NoAgent",
        Says("Degraded", "True",
             "the agent of the stack's node has not answered the flow table for 10 s. Packets go on by the last one that it had; "
             "engines that came since get none",
             "see whether it runs, and its log: `kubectl get pods -A -l app.kubernetes.io/component=agent -o wide`, `kubectl logs`"))
    BACKEND_NOT_FOUND = (
        "BackendNotFound",
        Says("Degraded", "True", "a listener's Service, or its port, is not there; new flows of the listener are dropped as `no_backend`", "create it, or name another"))
    FORWARDING_OFF = (
        "ForwardingOff",
        Says("Available", "False", _FORWARDING, _NEEDS), Says("Degraded", "True", _FORWARDING, _NEEDS))
    ADDRESS_TAKEN = (
        "AddressTaken",
        Says("Available", "False", _TAKEN, _NEEDS), Says("Degraded", "True", _TAKEN, _NEEDS))
    PATH_BROKEN = (
        "PathBroken",
        Says("Available", "False", _BROKEN, _NEEDS), Says("Degraded", "True", _BROKEN, _NEEDS))
    ENGINE_NOT_READY = (
        "EngineNotReady",
        Says("Degraded", "True", "an active engine does not serve; packets of its buckets wait for it, or are lost",
             "`kubectl describe` its PacketEngine"))
    ENGINE_EVICTED = (
        "EngineEvicted",
        Says("Degraded", "True", "somebody deletes a pod (`kubectl drain`): its buckets go to another engine, which is made for it", "wait"))
    CRD_OUTDATED = (
        "CRDOutdated",
        Says("Degraded", "True", "the cluster's definitions (CRDs) are not those of the operator: new fields are lost when they are written", "apply the CRDs of its version"))
    NOTHING_IN_THE_WAY = (
        "NothingInTheWay", Says("FirewallOpen", "True", "the node's packet filter lets packets of the stack pass"))
    PACKETS_DROPPED = (
        "PacketsDropped",
        Says("FirewallOpen", "False",
             "a rule or a policy of the node's packet filter drops packets of the stack; the message says which, whose it is, and by which interfaces they come. "
             "With `--firewall Manage` the agent could not help it",
             "[what the agent changes](install.md#what-the-agent-changes-in-the-nodes-packet-filter); `packetstack preflight` says what helps"))
    MAY_DROP_PACKETS = (
        "MayDropPackets",
        Says("FirewallOpen", "Unknown", "a rule drops some packets of the stack, or all but those of uplinks; or the rules could not be read",
             "see whether traffic passes; `packetstack preflight` says what helps"))
    # ---- of the autoscaler
    SUCCEEDED_GET_SCALE = ("SucceededGetScale", Says("AbleToScale", "True", _FREE))
    READY_FOR_NEW_SCALE = ("ReadyForNewScale", Says("AbleToScale", "True", _FREE))
    SUCCEEDED_RESCALE = ("SucceededRescale", Says("AbleToScale", "True", _FREE))
    SCALE_DOWN_STABILIZED = ("ScaleDownStabilized", Says("AbleToScale", "True", _STABLE, _STABLE_REMEDY))
    SCALE_UP_STABILIZED = ("ScaleUpStabilized", Says("AbleToScale", "True", _STABLE, _STABLE_REMEDY))
    FAILED_GET_SCALE = (
        "FailedGetScale", Says("AbleToScale", "False", "`replicas` could not be read", "do what the message says; it is tried again"))
    FAILED_UPDATE_SCALE = (
        "FailedUpdateScale", Says("AbleToScale", "False", "`replicas` could not be written", "do what the message says; it is tried again"))
    VALID_METRIC_FOUND = ("ValidMetricFound", Says("ScalingActive", "True", "a metric gives a number of engines"))
    FAILED_GET_ENGINE_METRIC = (
        "FailedGetEngineMetric",
        Says("ScalingActive", "False",
             "an `Engine` metric cannot be used: samples are missing, so it may not ask for fewer engines. "
             "Normal for some seconds after engines came or were made anew",
             "if it stays: `packetstack describe`, for engines that are active and not ready"))
    FAILED_GET_PODS_METRIC = ("FailedGetPodsMetric", Says("ScalingActive", "False", _NO_METRIC, _NO_METRIC_REMEDY))
    FAILED_GET_OBJECT_METRIC = ("FailedGetObjectMetric", Says("ScalingActive", "False", _NO_METRIC, _NO_METRIC_REMEDY))
    FAILED_GET_EXTERNAL_METRIC = ("FailedGetExternalMetric", Says("ScalingActive", "False", _NO_METRIC, _NO_METRIC_REMEDY))
    FAILED_GET_RESOURCE_METRIC = ("FailedGetResourceMetric", Says("ScalingActive", "False", _NO_METRIC, _NO_METRIC_REMEDY))
    FAILED_GET_CONTAINER_RESOURCE_METRIC = (
        "FailedGetContainerResourceMetric", Says("ScalingActive", "False", _NO_METRIC, _NO_METRIC_REMEDY))
    INVALID_METRIC_SOURCE_TYPE = ("InvalidMetricSourceType", Says("ScalingActive", "False", _UNUSABLE, _SAID))
    INVALID_SELECTOR = ("InvalidSelector", Says("ScalingActive", "False", _UNUSABLE, _SAID))
    AMBIGUOUS_SELECTOR = ("AmbiguousSelector", Says("ScalingActive", "False", _UNUSABLE, _SAID))
    SCALING_DISABLED = (
        "ScalingDisabled",
        Says("ScalingActive", "False", "somebody set `replicas` to 0", "set it to 1 or more"),
        Says("VerticalScalingActive", "False", "there is no engine to measure, as `replicas` is 0", "set it to 1 or more"))
    EXTERNALLY_SCALED = (
        "ExternallyScaled",
        Says("ScalingActive", "False", "somebody else wrote `replicas`; the message says who. The autoscaler changes nothing any more",
             "find out who; to give it back: `spec.autoscaling.paused` true, then false"),
        Says("VerticalScalingActive", "False",
             "somebody else wrote `engine.cores`, or `replicas` where they are decided by `vertical` too; the message says who. "
             "Nothing is changed any more", "find out who; to give it back: `spec.autoscaling.paused` true, then false"))
    INVALID_SCHEDULE = (
        "InvalidSchedule",
        Says("ScalingActive", "False", "a schedule has a cron or a time zone that cannot be read", _SAID),
        Says("VerticalScalingActive", "False", "a schedule has a cron or a time zone that cannot be read", _SAID))
    TOO_MANY_REPLICAS = ("TooManyReplicas", Says("ScalingLimited", "True", _LIMITED, "raise `maxReplicas` if it stays there"))
    TOO_FEW_REPLICAS = ("TooFewReplicas", Says("ScalingLimited", "True", _LIMITED, "raise `maxReplicas` if it stays there"))
    SCALE_UP_LIMIT = ("ScaleUpLimit", Says("ScalingLimited", "True", _RATE, "wait, or other policies"))
    SCALE_DOWN_LIMIT = ("ScaleDownLimit", Says("ScalingLimited", "True", _RATE, "wait, or other policies"))
    DESIRED_WITHIN_RANGE = ("DesiredWithinRange", Says("ScalingLimited", "False", "nothing is cut"))
    SCALED_TO_ZERO = (
        "ScaledToZero",
        Says("ScaledToZero", "True", "the autoscaler set `replicas` to 0; only with a metric that can be read without an engine"))
    NOT_SCALED_TO_ZERO = ("NotScaledToZero", Says("ScaledToZero", "False", "the autoscaler did not set `replicas` to 0"))
    # ---- of the vertical autoscaler
    TRIGGERS_KNOWN = ("TriggersKnown", Says("VerticalScalingActive", "True", "the load of all active engines is known"))
    MISSING_SAMPLES = (
        "MissingSamples",
        Says("VerticalScalingActive", "False",
             "the load of some engines is not known. They count as idle, and no core is taken away. "
             "Normal for some seconds after engines came or were made anew",
             "if it stays: `packetstack describe`, for engines that are active and not ready"))
    FAILED_UPDATE_CORES = (
        "FailedUpdateCores",
        Says("VerticalScalingActive", "False", "`engine.cores` could not be written", "do what the message says; it is tried again"))
    WITHIN_LIMITS = ("WithinLimits", Says("VerticalScalingLimited", "False", "what the triggers ask for is done, or they ask for nothing"))
    MAX_CORES = (
        "MaxCores",
        Says("VerticalScalingLimited", "True", "the triggers ask for more than `maxCores`, and `maxReplicas`, allow",
             "raise them if it stays there and the node, or a licence, has more"))
    HOLD_TIME = (
        "HoldTime", Says("VerticalScalingLimited", "True", "a trigger asks for another size, but not yet for `holdSeconds`", "wait, or a shorter `holdSeconds`"))
    COOL_DOWN = (
        "CoolDown",
        Says("VerticalScalingLimited", "True", "another size is asked for within `coolDownSeconds` after the last change", "wait, or a shorter `coolDownSeconds`"))
    CHANGE_UNDER_WAY = (
        "ChangeUnderWay",
        Says("VerticalScalingLimited", "True", "engines are not yet those that were asked for last: until then their load is no measure", "wait; `Progressing` says what it waits for"))
    NO_FREE_CORE = (
        "NoFreeCore",
        Says("VerticalScalingLimited", "True", "the node has no room for engines of the size that was asked for; the engines that are there go on",
             "`CapacityAvailable` says what is missing; make room, or lower `maxCores`"))
    # ---- of an engine
    SERVING = (
        "Serving",
        Says("Ready", "True", "a datapath serves the engine's queues"),
        Says("packetstack.io/DataPath", "True", "a datapath serves the engine's queues"))
    NOT_SERVING = ("NotServing", Says("packetstack.io/DataPath", "False", "no datapath serves the engine's queues; the message says why"))
    PENDING = ("Pending", Says("Ready", "False", "its pod does not run yet; the message says what it waits for", _SAID))
    STARTING = ("Starting", Says("Ready", "False", "its pod runs, and its datapath does not serve yet", "wait"))
    ACTIVE = (
        "Active", Says("Ready", "False", "it has buckets, and no datapath serves them: see `EngineNotReady`", "`packetstack logs SLOT`"))
    DRAINING = ("Draining", Says("Ready", "False", "it hands its buckets over and will be removed", "wait"))
    FAILED = ("Failed", Says("Ready", "False", "its pod has ended", "`kubectl describe` the pod; another is made"))
    # fmt: on


Reason = EventReason | ConditionReason
"""What an event may have: one of its own, or that of the condition which it announces."""
Problem = tuple[ConditionReason, str]
"""Reason and message of a condition."""


@dataclass(frozen=True, slots=True)
class Event:
    """To be shown with the stack."""

    reason: Reason
    message: str

    @property
    def kind(self) -> Kind:
        """Whether it is a warning."""
        return self.reason.kind


def named(name: str) -> Reason:
    """The reason of this name. LookupError if there is none."""
    every: tuple[Reason, ...] = (*EventReason, *ConditionReason)
    for reason in every:
        if reason == name:
            return reason
    raise LookupError(f"{name} is no reason of {__name__}")


def split(text: str, otherwise: ConditionReason) -> Problem:
    """Reason and message of what an agent says, as in "AddressConflict: 192.0.2.10 belongs to stack default/web"; a text
    that does not begin with a reason is a message of `otherwise`."""
    name, _, message = text.partition(": ")
    for reason in ConditionReason:
        if reason == name and message:
            return reason, message
    return otherwise, text


def why_not(condition: str, status: Value, reason: ConditionReason) -> str:
    """What is wrong with giving this reason for this condition; empty if nothing is."""
    if any((s.condition, s.status) == (condition, status) for s in reason.says):
        return ""
    return f"{reason} is no reason for {condition} to be {status}: {__name__} does not say what that means"


# ---- tables of docs/troubleshoot.md ------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """Name of a table -> the table in Markdown."""
    everything = [(reason, says) for reason in ConditionReason for says in reason.says]
    special = {"autoscaler": AUTOSCALER, "vertical": VERTICAL, "engine": ENGINE}
    plain = [pair for pair in everything if pair[1].condition not in AUTOSCALER + VERTICAL + ENGINE]
    return {
        "conditions": _conditions(plain),
        **{name: _conditions([p for p in everything if p[1].condition in types]) for name, types in special.items()},
        "warnings": _events(r for r in EventReason if r.kind == "Warning"),
        "events": _events(r for r in EventReason if r.kind == "Normal"),
    }


def _conditions(rows: list[tuple[ConditionReason, Says]]) -> str:
    """Each condition once, in the order in which it is first named; reasons with the same meaning share a row."""
    order = list(dict.fromkeys(says.condition for _, says in rows))
    rows = sorted(rows, key=lambda row: order.index(row[1].condition))
    lines = ["| condition | reason | meaning | what to do |", "|---|---|---|---|"]
    for says, group in groupby(rows, key=lambda row: row[1]):
        status = {"True": "", "False": " false", "Unknown": " unknown"}[says.status]
        names = ", ".join(f"`{reason}`" for reason, _ in group)
        lines.append(f"| `{says.condition}`{status} | {names} | {says.meaning} | {says.remedy} |")
    return "\n".join(lines)


def _events(reasons: Iterable[EventReason]) -> str:
    rows = [f"| `{r}` | {r.meaning} | {r.remedy} |" for r in reasons]
    return "\n".join(["| event | meaning | what to do |", "|---|---|---|", *rows])


def fill(document: str, made: Mapping[str, str] | None = None, module: str = MODULE) -> str:
    """The document with the present tables between its markers. LookupError if it has not each of them once.

    `made`: other tables than those of this module, by name, and the `module` that makes them.
    """
    for name, table in (tables() if made is None else made).items():
        begin, end = f"<!-- {name}: made by python -m {module} -->\n", f"<!-- end of {name} -->"
        found = re.findall(f"{re.escape(begin)}(.*?){re.escape(end)}", document, re.DOTALL)
        if len(found) != 1:
            raise LookupError(f"no table {name}, or more than one: it stands between {begin.strip()} and {end}")
        document = document.replace(f"{begin}{found[0]}{end}", f"{begin}\n{table}\n\n{end}")
    return document


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(fill(path.read_text()))
