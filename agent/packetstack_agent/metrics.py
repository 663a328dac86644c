"""Prometheus metrics of the agent: read from shared memory and maps when they are asked for."""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from packetstack_agent.agent import Agent
from packetstack_agent.engines import Engine
from packetstack_agent.managed import Managed
from packetstack_core.assignment import State
from packetstack_core.transitions import SetState
from packetstack_core.verbs import Json


class AgentCollector(Collector):
    """All families, from one look at the agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        """Names are stable: docs/metrics.md lists them. None is a name of the operator's too, or a sum would count twice."""
        agent = self._agent
        director = CounterMetricFamily(
            "packetstack_director_packets", "Packets by what the director did with them", labels=["result"]
        )
        for name, count in agent.status.director_counters().items():
            director.add_metric([name], count)
        yield director
        host = CounterMetricFamily(
            "packetstack_host_packets", "Frames of engines by what became of them on the node", labels=["result"]
        )
        for name, count in agent.status.host_counters().items():
            host.add_metric([name], count)
        yield host
        stacks = _StackFamilies()
        for name, managed in sorted(agent.stacks.items()):
            stacks.add(name, managed, agent.status.of(managed))
        yield from stacks.all()


class _StackFamilies:
    """What is exported of each stack."""

    def __init__(self) -> None:
        self.engines = GaugeMetricFamily("packetstack_node_engines", "Engines by state", labels=["stack", "state"])
        self.replicas = GaugeMetricFamily("packetstack_node_desired_engines", "spec.replicas", labels=["stack"])
        self.cores = GaugeMetricFamily("packetstack_node_desired_cores", "spec.engine.cores", labels=["stack"])
        self.flows = GaugeMetricFamily("packetstack_flows", "Live flows", labels=["stack", "engine"])
        self.buckets = GaugeMetricFamily("packetstack_buckets", "Buckets owned", labels=["stack", "engine"])
        self.moved = CounterMetricFamily("packetstack_buckets_moved", "Changes of owner", labels=["stack"])
        self.packets = CounterMetricFamily(
            "packetstack_engine_packets", "Engine counters: frames, bytes, flows", labels=["stack", "engine", "event"]
        )
        self.drops = CounterMetricFamily("packetstack_drops", "Frames dropped", labels=["stack", "stage", "reason"])
        self.shed = CounterMetricFamily(
            "packetstack_shed_packets",
            "Packets of strangers dropped before the engines",
            labels=["stack", "listener", "kind"],
        )
        self.busy = CounterMetricFamily(
            "packetstack_core_busy_cycles", "TSC cycles spent on packets", labels=["stack", "engine", "core"]
        )
        self.cycles = CounterMetricFamily("packetstack_core_cycles", "TSC cycles", labels=["stack", "engine", "core"])
        self.queue = CounterMetricFamily(
            "packetstack_queue_packets", "Frames received", labels=["stack", "engine", "queue", "core"]
        )
        self.depth = GaugeMetricFamily(
            "packetstack_queue_depth", "Frames that wait in it, at the last look", labels=["stack", "engine", "queue"]
        )
        self.queue_busy = CounterMetricFamily(
            "packetstack_queue_busy_cycles", "TSC cycles spent on it", labels=["stack", "engine", "queue", "core"]
        )
        self.steps = GaugeMetricFamily(
            "packetstack_node_autoscaler_decision",
            "Engines after each step of the last decision",
            labels=["stack", "step"],
        )
        self.limits = GaugeMetricFamily(
            "packetstack_node_autoscaler_limit", "Fewest and most engines", labels=["stack", "limit"]
        )
        self.rebalanced = CounterMetricFamily("packetstack_rebalanced", "Moves by load", labels=["stack", "what"])
        self.uneven = GaugeMetricFamily("packetstack_load_max_over_mean", "Busiest core by the mean", labels=["stack"])
        self.elephants = GaugeMetricFamily(
            "packetstack_elephants", "Buckets that take most of a core", labels=["stack"]
        )
        self.hold = GaugeMetricFamily(
            "packetstack_handover_hold_seconds", "Longest fence of the last transfers", labels=["stack"]
        )
        self.mirrored = CounterMetricFamily(
            "packetstack_mirrored_packets", "Copies that a set of engines got", labels=["stack", "set"]
        )
        self.rejected = CounterMetricFamily(
            "packetstack_rejected_packets", "Copies that the other set handles", labels=["stack", "set", "reason"]
        )
        self.kept = GaugeMetricFamily(
            "packetstack_kept_connections", "Connections that a set that drains has left", labels=["stack", "set"]
        )
        self.draining = GaugeMetricFamily(
            "packetstack_draining_seconds", "Time since a set began to drain", labels=["stack", "set"]
        )
        self.backend = GaugeMetricFamily(
            "packetstack_backend_flows", "Live flows", labels=["stack", "backend", "healthy"]
        )

    def all(self) -> tuple[Metric, ...]:
        """Every one, also those that no stack has a value of."""
        return tuple(vars(self).values())

    def add(self, name: str, managed: Managed, shown: Json) -> None:
        """One stack; `shown` is its resource with the status of now."""
        status = shown["status"]
        self.replicas.add_metric([name], shown["spec"]["replicas"])
        self.cores.add_metric([name], managed.stack.resource.spec.engine.cores)
        for state in State:
            count = sum(e["state"] == state for e in status["engines"])
            self.engines.add_metric([name, str(state)], count)
        self.moved.add_metric([name], managed.moved)
        self.hold.add_metric([name], max(managed.holds_ns, default=0) / 1e9)
        for b in status["backends"]:
            self.backend.add_metric([name, f"{b['address']}|{b['port']}", str(b["healthy"]).lower()], b["flows"])
        for stage, reasons in status["drops"].items():
            if stage not in ("director", "host"):
                for reason, count in reasons.items():
                    self.drops.add_metric([name, stage, reason], count)
        for s in status["shedding"]:
            self.shed.add_metric([name, s["listener"], s["kind"]], s["dropped"])
        self._add_sets(name, managed, status.get("sets", ()))
        for e in status["engines"]:
            self._add_engine(name, managed.engines[e["slot"]], e)
        self._add_decisions(name, status)

    def _add_sets(self, name: str, managed: Managed, shown: Sequence[Json]) -> None:
        """What two sets have of the same traffic."""
        for s in shown:
            where = [name, str(s["id"])]
            self.mirrored.add_metric(where, s["mirrored"])
            for reason, count in s["rejected"].items():
                self.rejected.add_metric([*where, reason], count)
        if (old := managed.sets.one(SetState.DRAINING)) is not None:
            where = [name, str(old.id)]
            self.draining.add_metric(where, time.monotonic() - old.since)
            left = next((s["connections"] for s in shown if s["id"] == old.id), None)
            if left is not None:
                self.kept.add_metric(where, left)

    def _add_decisions(self, name: str, status: Json) -> None:
        """What was decided by load."""
        balance = status["rebalance"]
        self.rebalanced.add_metric([name, "buckets"], balance["bucketsMoved"])
        self.rebalanced.add_metric([name, "queues"], balance["queuesMoved"])
        self.elephants.add_metric([name], len(balance["elephants"]))
        if balance["maxOverMean"] is not None:
            self.uneven.add_metric([name], balance["maxOverMean"])
        if decided := status.get("autoscaling"):
            for step in ("current", "proposed", "stabilized", "desired"):
                if step in decided["record"]:
                    self.steps.add_metric([name, step], decided["record"][step])
            self.limits.add_metric([name, "min"], decided["minReplicas"])
            self.limits.add_metric([name, "max"], decided["maxReplicas"])

    def _add_engine(self, name: str, engine: Engine, shown: Json) -> None:
        slot = str(engine.blueprint.id or engine.slot)  # in a cluster by the operator's number, as its pod
        self.flows.add_metric([name, slot], shown["flows"])
        self.buckets.add_metric([name, slot], shown["buckets"])
        for core in shown["cores"]:
            view = engine.core(core["core"])
            where = [name, slot, str(core["core"])]
            self.busy.add_metric(where, view.busy_cycles)
            self.cycles.add_metric(where, view.total_cycles)
            for q in core["queues"]:
                served = [name, slot, str(q["queue"]), str(core["core"])]
                self.queue.add_metric(served, q["received"])
                self.queue_busy.add_metric(served, engine.queue(q["queue"]).cycles)
                self.depth.add_metric(served[:3], q["depth"])
        if engine.view is not None:
            for event, count in engine.counters().items():
                self.packets.add_metric([name, slot, event], count)


def render(agent: Agent) -> str:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(AgentCollector(agent))
    return generate_latest(registry).decode()
