"""Names of metrics."""

from types import SimpleNamespace
from typing import Any

from packetstack_agent.metrics import AgentCollector
from packetstack_operator.metrics import Metrics


def test_no_metric_has_one_name_in_the_agent_and_the_operator() -> None:
    """Whoever sums it would count twice."""
    status = SimpleNamespace(director_counters=dict, host_counters=dict)
    agent: Any = SimpleNamespace(status=status, stacks={})
    of_agent = {m.name for m in AgentCollector(agent).collect()}
    of_operator = {m.name for m in Metrics().registry.collect()}
    assert len(of_agent) > 20
    assert len(of_operator) > 10
    assert not of_agent & of_operator
