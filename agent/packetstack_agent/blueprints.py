"""What an engine is made from, and where on the node its pod is."""

from dataclasses import dataclass
from pathlib import Path

from packetstack_agent import namespaces, processes
from packetstack_agent.errors import AgentError
from packetstack_core.verbs import Json

FIRST_SET = 1
"""Number of the set of engines that a stack begins with."""
POD_DEVICE = "pkst0"
"""An engine's interface in its pod when the agent makes it; eth0 is the cluster network's."""


@dataclass
class Blueprint:
    """What an engine is made from."""

    stack: str
    slot: int
    template: str
    queues: int
    cores: int
    cpu_policy: str
    cpus: tuple[int, ...]
    """CPU of each core; empty with cpuPolicy Shared: cores run where there is room."""
    memory_bytes: int
    namespace: str
    owner: str
    directory: Path
    arena: Path
    """That of its set, as are those that follow."""
    config: Path
    flows: Path
    """Where the map is pinned that goes with the arena."""
    memory: Path
    """Where the engine's own is pinned."""
    shard: str
    """Layout of the shards of its set: the one that its build must have."""
    index: int = 0
    """The stack's number on the node."""
    id: int = 0
    """The operator's number for it; 0 without Kubernetes."""
    pod: str = ""
    """Name of its pod. Empty: the agent starts its processes in a network namespace of its own."""
    pod_uid: str = ""
    interface: str = ""
    """One that a CNI plugin has made in the pod. Empty: the agent makes a veth pair."""
    set: int = FIRST_SET
    """Number of its set: the engines of the stack that share arena and configuration."""

    def record(self) -> Json:
        """What an agent that comes later cannot know otherwise."""
        kept = (
            "stack", "slot", "template", "queues", "cores", "cpu_policy", "cpus", "memory_bytes", "namespace",
            "id", "pod", "pod_uid", "interface", "set",
        )  # fmt: skip
        return {name: getattr(self, name) for name in kept}

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.pod or f"{self.stack}-{self.slot}"

    @property
    def device(self) -> str:
        """Its interface, by the name inside of its namespace."""
        return self.interface or (POD_DEVICE if self.pod else "eth0")

    def place(self) -> Path:
        """Its network namespace; AgentError if its pod has no process."""
        if not self.pod:
            return namespaces.NAMESPACES / self.namespace
        pids = processes.of_pod(self.pod_uid)
        if not pids:
            raise AgentError(f"pod {self.pod}: has no process on this node; it is starting or gone")
        path = Path(f"/proc/{pids[0]}/ns/net")
        try:
            inode = path.stat().st_ino
        except OSError:
            raise AgentError(f"pod {self.pod}: has ended") from None
        if inode == namespaces.own_inode():
            raise AgentError(f"pod {self.pod}: uses the node's network; an engine needs a network namespace of its own")
        return path
