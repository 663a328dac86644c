"""Names of metrics."""

from types import SimpleNamespace

from packetstack_agent.metrics import AgentCollector
from packetstack_operator.metrics import Metrics


def test_no_metric_has_one_name_in_the_agent_and_the_operator() -> None:
    """Whoever sums it would count twice."""
    status = SimpleNamespace(director_counters=dict, host_counters=dict)
    of_agent = {m.name for m in AgentCollector(SimpleNamespace(status=status, stacks={})).collect()}  # type: ignore[arg-type]
    of_operator = {m.name for m in Metrics().registry.collect()}
    assert len(of_agent) > 20
    assert len(of_operator) > 10
    assert not of_agent & of_operator
