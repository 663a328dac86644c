"""Prometheus metrics of the agent: read from shared memory and maps when they are asked for."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from packetstack_agent.agent import Agent
from packetstack_core.planning import State


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

        engines = GaugeMetricFamily("packetstack_node_engines", "Engines by state", labels=["stack", "state"])
        replicas = GaugeMetricFamily("packetstack_node_desired_engines", "spec.replicas", labels=["stack"])
        flows = GaugeMetricFamily("packetstack_flows", "Live flows", labels=["stack", "engine"])
        buckets = GaugeMetricFamily("packetstack_buckets", "Buckets owned", labels=["stack", "engine"])
        moved = CounterMetricFamily("packetstack_buckets_moved", "Changes of owner", labels=["stack"])
        packets = CounterMetricFamily(
            "packetstack_engine_packets", "Engine counters: frames, bytes, flows", labels=["stack", "engine", "event"]
        )
        drops = CounterMetricFamily("packetstack_drops", "Frames dropped", labels=["stack", "stage", "reason"])
        shed = CounterMetricFamily(
            "packetstack_shed_packets",
            "Packets of strangers dropped before the engines",
            labels=["stack", "listener", "kind"],
        )
        busy = CounterMetricFamily(
            "packetstack_core_busy_cycles", "TSC cycles spent on packets", labels=["stack", "engine", "core"]
        )
        cycles = CounterMetricFamily("packetstack_core_cycles", "TSC cycles", labels=["stack", "engine", "core"])
        queue = CounterMetricFamily(
            "packetstack_queue_packets", "Frames received", labels=["stack", "engine", "queue", "core"]
        )
        depth = GaugeMetricFamily(
            "packetstack_queue_depth", "Frames that wait in it, at the last look", labels=["stack", "engine", "queue"]
        )
        queue_busy = CounterMetricFamily(
            "packetstack_queue_busy_cycles", "TSC cycles spent on it", labels=["stack", "engine", "queue", "core"]
        )
        steps = GaugeMetricFamily(
            "packetstack_node_autoscaler_decision",
            "Engines after each step of the last decision",
            labels=["stack", "step"],
        )
        limits = GaugeMetricFamily(
            "packetstack_node_autoscaler_limit", "Fewest and most engines", labels=["stack", "limit"]
        )
        rebalanced = CounterMetricFamily("packetstack_rebalanced", "Moves by load", labels=["stack", "what"])
        uneven = GaugeMetricFamily("packetstack_load_max_over_mean", "Busiest core by the mean", labels=["stack"])
        elephants = GaugeMetricFamily("packetstack_elephants", "Buckets that take most of a core", labels=["stack"])
        hold = GaugeMetricFamily(
            "packetstack_handover_hold_seconds", "Longest fence of the last transfers", labels=["stack"]
        )
        backend = GaugeMetricFamily("packetstack_backend_flows", "Live flows", labels=["stack", "backend", "healthy"])
        for name, managed in sorted(agent.stacks.items()):
            status = agent.status.of(managed)
            replicas.add_metric([name], status["spec"]["replicas"])
            for state in State:
                count = sum(e["state"] == state for e in status["status"]["engines"])
                engines.add_metric([name, str(state)], count)
            moved.add_metric([name], managed.moved)
            hold.add_metric([name], max(managed.holds_ns, default=0) / 1e9)
            balance = status["status"]["rebalance"]
            rebalanced.add_metric([name, "buckets"], balance["bucketsMoved"])
            rebalanced.add_metric([name, "queues"], balance["queuesMoved"])
            elephants.add_metric([name], len(balance["elephants"]))
            if balance["maxOverMean"] is not None:
                uneven.add_metric([name], balance["maxOverMean"])
            for b in status["status"]["backends"]:
                backend.add_metric([name, f"{b['address']}|{b['port']}", str(b["healthy"]).lower()], b["flows"])
            for stage, reasons in status["status"]["drops"].items():
                if stage not in ("director", "host"):
                    for reason, count in reasons.items():
                        drops.add_metric([name, stage, reason], count)
            for s in status["status"]["shedding"]:
                shed.add_metric([name, s["listener"], s["kind"]], s["dropped"])
            for e in status["status"]["engines"]:
                engine = managed.engines[e["slot"]]
                slot = str(engine.blueprint.id or e["slot"])  # in a cluster by the operator's number, as its pod
                flows.add_metric([name, slot], e["flows"])
                buckets.add_metric([name, slot], e["buckets"])
                for core in e["cores"]:
                    view = engine.core(core["core"])
                    where = [name, slot, str(core["core"])]
                    busy.add_metric(where, view.busy_cycles)
                    cycles.add_metric(where, view.total_cycles)
                    for q in core["queues"]:
                        served = [name, slot, str(q["queue"]), str(core["core"])]
                        queue.add_metric(served, q["received"])
                        queue_busy.add_metric(served, engine.queue(q["queue"]).cycles)
                        depth.add_metric(served[:3], q["depth"])
                if engine.view is not None:
                    for event, count in engine.counters().items():
                        packets.add_metric([name, slot, event], count)
            if decided := status["status"].get("autoscaling"):
                for step in ("current", "proposed", "stabilized", "desired"):
                    if step in decided["record"]:
                        steps.add_metric([name, step], decided["record"][step])
                limits.add_metric([name, "min"], decided["minReplicas"])
                limits.add_metric([name, "max"], decided["maxReplicas"])
        yield from (engines, replicas, flows, buckets, moved, packets, drops, shed, busy, cycles)
        yield from (queue, queue_busy, depth, steps, limits, rebalanced, uneven, elephants, hold, backend)


def render(agent: Agent) -> str:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(AgentCollector(agent))
    return generate_latest(registry).decode()
