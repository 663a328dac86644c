"""The operator's metrics, as Prometheus reads them."""

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator
from math import inf

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from packetstack_core.autoscaling.status import Record
from packetstack_core.autoscaling.together import Round
from packetstack_operator.observing import Raw

LONGEST_NAME = 200
"""Characters of a label that a stack's author has written."""


class Stacks(Collector):
    """Sizes and conditions of stacks, as their status says at the time of a scrape."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], tuple[Raw, Iterable[Raw]]] = {}
        """Namespace and name -> PacketStack, its PacketEngines."""

    def collect(self) -> Iterator[Metric]:
        """One sample a stack and state."""
        names = ["namespace", "stack"]
        engines = GaugeMetricFamily("packetstack_engines", "Engines by state.", labels=[*names, "state"])
        desired = GaugeMetricFamily("packetstack_desired_engines", "Engines that the stack asks for.", labels=names)
        cores = GaugeMetricFamily(
            "packetstack_desired_cores", "Cores of an engine that the stack asks for.", labels=names
        )
        conditions = GaugeMetricFamily(
            "packetstack_condition", "1 if the condition of the stack is true, 0 if not.", labels=[*names, "type"]
        )
        for key, (stack, children) in sorted(self.known.items()):
            states = Count(str((e.get("status") or {}).get("state") or "Pending") for e in children)
            for state in ("Pending", "Starting", "Active", "Draining", "Failed"):
                engines.add_metric([*key, state], states[state])
            desired.add_metric(list(key), int(stack.get("spec", {}).get("replicas", 1)))
            cores.add_metric(list(key), int((stack.get("spec", {}).get("engine") or {}).get("cores", 1)))
            for c in (stack.get("status") or {}).get("conditions") or ():
                conditions.add_metric([*key, c["type"]], float(c["status"] == "True"))
        yield from (engines, desired, cores, conditions)


class Loads(Collector):
    """How old what is known of the stacks' load is, at the time of a scrape."""

    def __init__(self) -> None:
        self.ages: Callable[[], Iterable[tuple[tuple[str, str], float]]] = tuple
        """Namespace and name of each stack whose load somebody asks for, and seconds."""

    def collect(self) -> Iterator[Metric]:
        """One sample a stack."""
        age = GaugeMetricFamily(
            "packetstack_load_age_seconds",
            "Time since the agent last said what a stack's engines do.",
            labels=["namespace", "stack"],
        )
        for key, seconds in self.ages():
            age.add_metric(list(key), seconds)
        yield age


class Autoscalers(Collector):
    """What the autoscalers decided last."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Round] = {}
        """By namespace and name of the stack."""

    def collect(self) -> Iterator[Metric]:
        """One sample a stack and step, and of each metric that could be read."""
        names = ["namespace", "stack"]
        steps = GaugeMetricFamily(
            "packetstack_autoscaler_decision",
            "Engines after each step of the last decision.",
            labels=[*names, "step"],
        )
        limits = GaugeMetricFamily("packetstack_autoscaler_limit", "Fewest and most engines.", labels=[*names, "limit"])
        usage = GaugeMetricFamily(
            "packetstack_autoscaler_usage_ratio",
            "What a metric was, by its target.",
            labels=[*names, "metric"],
        )
        for key, done in sorted(self.known.items()):
            if (decided := _decision(done)) is None:
                continue
            record, few, most = decided
            for step, value in (
                ("current", record.current),
                ("proposed", record.proposed),
                ("stabilized", record.stabilized),
                ("desired", record.desired),
            ):
                if value is not None:
                    steps.add_metric([*key, step], value)
            limits.add_metric([*key, "min"], few)
            limits.add_metric([*key, "max"], most)
            ratios: dict[str, float] = {}
            for p in record.proposals:
                value, name = p.usage if p.utilization is None else p.utilization, p.metric[:LONGEST_NAME]
                if value is not None:  # of two with one name the one that asks for more
                    ratios[name] = max(value / p.target.value, ratios.get(name, -inf))
            for name, ratio in ratios.items():
                usage.add_metric([*key, name], ratio)
        yield from (steps, limits, usage)


def _decision(done: Round) -> tuple[Record, int, int] | None:
    """What was decided about the number of engines, by metrics or by triggers, and the fewest and most; None if nothing
    was, as in the round in which another part stepped aside."""
    if done.horizontal is not None:
        return done.horizontal.decision.record, done.horizontal.spec.minimum, done.horizontal.spec.maximum
    wanted = done.spec.autoscaling
    if done.vertical is None or wanted is None or not wanted.vertical_decides_replicas:
        return None
    sizes = done.vertical.limits.sizes
    desired = (done.vertical.write or done.size).replicas
    return Record(done.size.replicas, desired), sizes[0].replicas, sizes[-1].replicas


class Metrics:
    """The operator's metrics, with a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.stacks = Stacks()
        self.registry.register(self.stacks)
        self.loads = Loads()
        self.registry.register(self.loads)
        self.autoscalers = Autoscalers()
        self.registry.register(self.autoscalers)
        self.duration = Histogram(
            "packetstack_reconcile_duration_seconds",
            "Time of one look at a stack, with its writes.",
            ["outcome"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        self.errors = Counter(
            "packetstack_reconcile_errors", "Looks at a stack that failed.", ["reason"], registry=self.registry
        )
        self.writes = Counter(
            "packetstack_api_writes", "Requests that change something.", ["verb", "kind"], registry=self.registry
        )
        self.scaled = Counter(
            "packetstack_scale_events", "Engines made, and let go.", ["direction"], registry=self.registry
        )
        self.load_errors = Counter(
            "packetstack_load_errors", "Questions to agents without an answer.", ["reason"], registry=self.registry
        )
        self.leader = Gauge("packetstack_leader", "1 while this process acts.", registry=self.registry)
        self.outdated = Gauge(
            "packetstack_crd_outdated",
            "1 if the cluster's definition is not that of this version.",
            ["kind"],
            registry=self.registry,
        )
