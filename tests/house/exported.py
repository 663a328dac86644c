"""What each program exports, as its collectors say: name of each sample -> its labels. Nothing runs for it."""

import re
from collections.abc import Iterable
from types import SimpleNamespace

from prometheus_client.core import Metric

from packetstack_agent.metrics import AgentCollector
from packetstack_engine.main import View
from packetstack_operator.metrics import Metrics


def of_the_agent() -> dict[str, set[str]]:
    """Of an agent without stacks: it names all families, and has no sample of most."""
    status = SimpleNamespace(director_counters=dict, host_counters=dict)
    return _samples(AgentCollector(SimpleNamespace(stacks={}, status=status)).collect())


def of_the_operator() -> dict[str, set[str]]:
    """Of an operator that has seen no stack."""
    metrics = Metrics()
    direct = {
        m._name: set(m._labelnames)
        for m in vars(metrics).values()
        if hasattr(m, "_labelnames")  # Counter, Gauge, Histogram: what they collect has labels only with samples
    }
    return _samples(metrics.registry.collect(), direct)


def of_an_engine() -> set[str]:
    """Names of the families of an engine's supervisor."""
    core = SimpleNamespace(counters=[0], busy_cycles=0, total_cycles=0, wakeups=0)
    view = SimpleNamespace(engine=SimpleNamespace(slot=1, cores=1), core=lambda _: core, _names={0: "PS_C_RECEIVED"})
    return set(re.findall(r"^# TYPE (\w+) counter$", View.metrics(view), re.MULTILINE))


def _samples(families: Iterable[Metric], direct: dict[str, set[str]] | None = None) -> dict[str, set[str]]:
    found = {}
    for family in families:
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        labels = set(getattr(family, "_labelnames", None) or (direct or {}).get(family.name, ()))
        found |= {f"{family.name}{ending}": labels for ending in endings}
    return found
