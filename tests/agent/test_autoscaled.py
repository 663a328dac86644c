"""The autoscaler of a real agent: it follows live flows, steps aside for a person, and outlives the agent."""

import time
from contextlib import ExitStack
from typing import Any

import pytest
from tests.lab.node import BACKENDS, VIP, Node, ask, listener, stack
from tests.waiting import eventually

FLOWS = {
    "type": "Engine",
    "engine": {"name": "ActiveFlows", "target": {"type": "AverageValue", "averageValue": "4"}},
}


def autoscaled(**changes: Any) -> dict[str, Any]:
    """A small stack of one to three engines, of one core each."""
    autoscaling = {"maxReplicas": 3, "syncPeriodSeconds": 1, "metrics": [FLOWS], **changes}
    return stack(
        replicas=1,
        engine={"cores": 1, "queuesPerCore": 1},
        listeners=[listener("web", VIP, BACKENDS)],
        snat={"addresses": ["198.51.100.0/31"]},
        autoscaling=autoscaling,
    )


def condition(node: Node, kind: str) -> dict[str, Any]:
    return next(c for c in node.status()["conditions"] if c["type"] == kind)


def serving(node: Node, replicas: int) -> bool:
    status = node.status()
    return bool(status["ready"] and status["readyReplicas"] == replicas)


@pytest.mark.slow
def test_a_stack_follows_its_flows_until_a_person_takes_its_size_over(node: Node) -> None:
    node.up(autoscaled())
    with ExitStack() as open_connections:
        connections = [open_connections.enter_context(node.connect()) for _ in range(10)]
        first = [ask(c) for c in connections]
        eventually(lambda: serving(node, 3), 20)
        shown = node.status()["autoscaling"]
        assert (shown["minReplicas"], shown["maxReplicas"]) == (1, 3)
        assert condition(node, "ScalingActive")["reason"] == "ValidMetricFound"
        events = [e for e in node.client.call("events", name="web") if e["reason"] == "SuccessfulRescale"]
        assert "engine metric ActiveFlows above target" in events[-1]["message"]
        for verb in ("explain", "describe"):
            assert "engine metric ActiveFlows" in node.packetstack(verb, "web")
        text = node.client.metrics()
        assert 'packetstack_node_autoscaler_limit{limit="max",stack="web"} 3.0' in text
        assert 'packetstack_node_autoscaler_decision{stack="web",step="desired"} 3.0' in text

        assert "unchanged" in node.up(autoscaled()), "the size is the autoscaler's, not that of the file"
        assert serving(node, 3)
        before = node.status()["autoscaling"]["lastScaleTime"]
        node.packetstack("upgrade", "--agent")
        assert node.status()["autoscaling"]["lastScaleTime"] == before, "the next agent knows"

        scaled = node.command("scale", "web", "--replicas", "2")
        assert (scaled.returncode, scaled.stdout) == (0, "stack web: from 3 to 2 engines\n")
        assert scaled.stderr.startswith("stack web: note: its autoscaler changes nothing any more")
        assert condition(node, "ScalingActive")["reason"] == "ExternallyScaled"
        node.packetstack("upgrade", "--agent")
        time.sleep(3)
        assert serving(node, 2)
        assert condition(node, "ScalingActive")["reason"] == "ExternallyScaled"
        assert "packetstack scale set spec.replicas to 2" in node.packetstack("explain", "web")

        node.up(autoscaled(paused=True))
        eventually(lambda: condition(node, "ScalingActive")["reason"] == "ValidMetricFound", 5)
        assert node.status()["autoscaling"]["decision"].endswith("paused, else 3")
        node.up(autoscaled())
        eventually(lambda: serving(node, 3), 10)
        assert [ask(c) for c in connections] == first, "no connection broke"
    plain = autoscaled()
    del plain["spec"]["autoscaling"]
    node.up(plain)
    assert serving(node, 1), "without autoscaling the file says how many there are"
    assert "autoscaling" not in node.status()
    node.command("down", "--all", "--yes")


@pytest.mark.slow
def test_row_6_flows_alone_give_engines_more_cores_and_take_them_back_without_a_broken_connection(node: Node) -> None:
    flows = {"type": "ActiveFlows", "above": 5, "target": 4, "below": 2}
    sized = {"maxCores": 3, "triggers": [flows], "holdSeconds": 2, "coolDownSeconds": 2}
    made = autoscaled(maxReplicas=1, vertical=sized)
    del made["spec"]["autoscaling"]["metrics"]
    node.up(made)

    def cores() -> tuple[int, set[int]]:
        status = node.client.call("get", name="web")[0]
        return status["spec"]["engine"]["cores"], {len(e["cores"]) for e in status["status"]["engines"]}

    with ExitStack() as open_connections:
        connections = [open_connections.enter_context(node.connect()) for _ in range(8)]
        first = [ask(c) for c in connections]
        eventually(lambda: cores() == (2, {2}) and serving(node, 1), 30)
        assert [ask(c) for c in connections] == first, "no connection broke"
        [event] = [e for e in node.client.call("events", name="web") if e["reason"] == "EnginesResized"]
        assert event["message"].startswith(
            "1 x 1 core -> 1 x 2 cores: ActiveFlows 8 is above 5 -> 2 cores. Engines are"
        )
        assert "it writes spec.engine.cores and spec.replicas" in node.packetstack("explain", "web")
        assert "unchanged" in node.up(made), "the size is the autoscaler's, not that of the file"
        node.packetstack("upgrade", "--agent")
        assert node.status()["autoscaling"]["vertical"]["lastScaleTime"], "the next agent knows"
        for c in connections[1:]:
            c.close()
        eventually(lambda: cores() == (1, {1}) and serving(node, 1), 60)
        assert ask(connections[0]) == first[0], "nor did the one that is left"
    node.command("down", "--all", "--yes")
