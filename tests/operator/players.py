"""What a control plane without nodes lacks, played: a node's kubelet with the scheduler, and the node's agent.

No engine runs here. Pods get the phases that a kubelet would report, and flow tables the answers that an agent would
give, so that the operator can be followed step by step. Real engines are in tests/headline.
"""

import datetime
import threading
from collections.abc import Callable
from typing import Any

from tests.cluster.server import JSON, Server, ServerError
from tests.operator.counters import PlayedCounters
from tests.waiting import POLL_SECONDS, eventually

from packetstack_core import kinds

STACKS = "/apis/packetstack.io/v1alpha1/namespaces/{}/packetstacks"
TABLES = "/apis/packetstack.io/v1alpha1/namespaces/{}/flowtables"
ENGINES = "/apis/packetstack.io/v1alpha1/namespaces/{}/packetengines"
PODS = "/api/v1/namespaces/{}/pods"


def timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PlayedNode:
    """One node: its kubelet and scheduler (a pod runs one step after it was seen), and its agent.

    Switches for tests: `room` pods fit; `refuse` is the reason with which the kubelet refuses pods; `holds` whether
    none starts; `agent` whether tables are answered; `stuck` engines that never get ready; `macs` of their interfaces.
    `counters` answers for the engines' load.
    """

    def __init__(
        self, server: Server, namespace: str, name: str = "node-0", counters: PlayedCounters | None = None
    ) -> None:
        self.server, self.namespace, self.name, self.counters = server, namespace, name, counters
        self.room = 100
        self.batch = 150  # buckets that change hands in one step
        self.refuse: tuple[str, str] | None = None
        self.holds = False
        self.agent = True
        self.stuck: set[int] = set()
        self.macs: dict[int, str] = {}
        self.words: dict[str, list[int]] = {}
        """Stack -> engine by bucket, as packets see it. 0: nobody."""
        self.broken: list[str] = []
        """What must never be seen."""
        self._attached: dict[str, dict[int, str]] = {}
        self._age: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PlayedNode":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            try:
                self.step()
            except ServerError as e:
                if e.status not in (404, 409):
                    self.broken.append(f"played node: {e}")
            except OSError:
                pass  # the control plane is restarted by a test
        self.server.close()

    def step(self) -> None:
        pods = self.server.items(PODS.format(self.namespace), "packetstack.io/stack")
        self._play_kubelet(pods)
        if self.agent:
            for table in self.server.items(TABLES.format(self.namespace)):
                self._play_agent(kinds.read(kinds.FlowTable, table), table, pods)

    # ---- kubelet and scheduler

    def _play_kubelet(self, pods: list[JSON]) -> None:
        placed = sum(bool(p["spec"].get("nodeName")) for p in pods)
        for pod in pods:
            path = f"{PODS.format(self.namespace)}/{pod['metadata']['name']}"
            phase = pod["status"].get("phase", "Pending")
            if pod["metadata"].get("deletionTimestamp"):
                if self._may_end(pod):
                    self.server.delete(path, gracePeriodSeconds=0)
            elif not pod["spec"].get("nodeName"):
                if placed < self.room and self._suits(pod):
                    self.server.request(
                        "POST",
                        f"{path}/binding",
                        {
                            "apiVersion": "v1",
                            "kind": "Binding",
                            "metadata": {"name": pod["metadata"]["name"]},
                            "target": {"kind": "Node", "name": self.name},
                        },
                    )
                    placed += 1
            elif phase == "Pending" and self.refuse is not None:
                reason, message = self.refuse
                self.server.merge(
                    f"{path}/status", {"status": {"phase": "Failed", "reason": reason, "message": message}}
                )
            elif phase == "Pending" and not self.holds:
                state = {"running": {"startedAt": timestamp()}}
                container = {
                    "name": "engine",
                    "image": pod["spec"]["containers"][0]["image"],
                    "imageID": "",
                    "ready": True,
                    "started": True,
                    "restartCount": 0,
                    "state": state,
                }
                status: JSON = {"phase": "Running", "containerStatuses": [container], "startTime": timestamp()}
                if self.counters is not None:
                    status["hostIP"] = "127.0.0.1"
                self.server.merge(f"{path}/status", {"status": status})
            elif phase == "Running":
                self._play_readiness(pod)

    def _play_readiness(self, pod: JSON) -> None:
        """Ready when its readiness gates are."""
        conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", ())}
        gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", ())]
        ready = str(all(conditions.get(gate) == "True" for gate in gates))
        if conditions.get("Ready", "False") != ready:
            body = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod["metadata"]["name"], "namespace": self.namespace},
                "status": {"conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": timestamp()}]},
            }
            self.server.apply(f"{PODS.format(self.namespace)}/{pod['metadata']['name']}/status", body, "kubelet")

    def _suits(self, pod: JSON) -> bool:
        terms = (
            pod["spec"]
            .get("affinity", {})
            .get("nodeAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", {})
            .get("nodeSelectorTerms", [])
        )
        return not terms or any(self.name in f["values"] for t in terms for f in t.get("matchFields", ()))

    def _may_end(self, pod: JSON) -> bool:
        """The engine's init waits for the agent to let it go; the kubelet not longer than the grace period."""
        stack = pod["metadata"]["labels"]["packetstack.io/stack"]
        number = int(pod["metadata"]["labels"]["packetstack.io/engine"])
        attached = self._attached.get(stack, {}).get(number) == pod["metadata"]["uid"]
        return not attached or (pod["metadata"].get("deletionGracePeriodSeconds") or 0) < 5

    # ---- agent

    def _play_agent(self, table: kinds.FlowTable, raw: JSON, pods: list[JSON]) -> None:
        spec, name = table.spec, table.metadata.name
        if spec.node != self.name:
            return
        words = self.words.setdefault(name, [0] * spec.flow_table.buckets)
        attached = self._attached.setdefault(name, {})
        here = {p["metadata"]["uid"] for p in pods}
        for number, uid in list(attached.items()):
            if uid not in here:
                del attached[number]  # the interface is gone
        for engine in spec.engines:
            if engine.pod_uid in here and engine.pod_uid:
                attached[engine.id] = engine.pod_uid
        wanted = [o.slot if o else 0 for o in spec.owner_ids()]
        ready = {i for i in attached if i not in self.stuck}
        staying = any(e.state in ("Starting", "Active", "Pending") for e in spec.engines)
        moved, settled = 0, True
        for bucket, (now, then) in enumerate(zip(words, wanted, strict=True)):
            if now == then or (not then and staying) or (then and then not in ready):
                settled = settled and now == then
                continue
            if moved == self.batch:  # as real handovers are
                settled = False
                break
            words[bucket] = then
            moved += 1
        named = {e.id for e in spec.engines}
        for number in list(attached):
            if number not in named and number not in words:
                del attached[number]
        if self.counters is not None:
            states = {e.id: e.state for e in spec.engines}
            self.counters.attach(
                f"{self.namespace}.{name}",
                {f"{name}-{i}": states.get(i, "Draining") for i in sorted(attached)},
                {f"{name}-{e.id}": e.cores for e in spec.engines},
            )
        report = {
            "node": self.name,
            "observedGeneration": raw["metadata"]["generation"],
            "settled": settled,
            "owned": sum(w != 0 for w in words),
            "engines": [
                {
                    "id": i,
                    "name": f"{name}-{i}",
                    "ready": i in ready,
                    "buckets": words.count(i),
                    "flows": 0,
                    "mac": self.macs.get(i, ""),
                }
                for i in sorted(attached)
            ],
        }
        present = next((n for n in raw.get("status", {}).get("nodes", []) if n["node"] == self.name), None)
        if present is None or any(present.get(k, type(v)()) != v for k, v in report.items()):
            body = {
                "apiVersion": raw["apiVersion"],
                "kind": raw["kind"],
                "metadata": {"name": name, "namespace": self.namespace},
                "status": {"nodes": [report]},
            }
            path = f"{TABLES.format(self.namespace)}/{name}/status"
            self.server.apply(path, body, f"packetstack-agent-{self.name}")

    def owners(self, stack: str) -> set[int]:
        """Engines that packets of the stack reach."""
        return set(self.words.get(stack, ())) - {0}


def wait(condition: Callable[[], Any], seconds: float = 20.0, every: float = POLL_SECONDS) -> Any:
    """`eventually`, with the patience that a control plane beside other work needs."""
    return eventually(condition, seconds, every_seconds=every)
