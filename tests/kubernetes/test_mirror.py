"""A stack gets a second set of engine pods by Mirror, under live traffic: no connection breaks."""

from tests.waiting import eventually

from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, UDP_PORT, VIP, WAIT_SECONDS, Installed, stack

CONNECTIONS, FLOWS = 200, 20
SHORT = {
    "buckets": 1024, "maxFlows": 50000, "udpIdleTimeoutSeconds": 5,
    "tcpClosedTimeoutSeconds": 1, "tcpTimeWaitTimeoutSeconds": 1,
}  # fmt: skip


def test_another_set_of_engines_takes_over_and_the_first_goes_when_its_connections_have_ended(
    packetstack: Installed, servers: Servers, space: str
) -> None:
    def sets() -> list[tuple[int, str]]:
        return [(s["id"], s["state"]) for s in packetstack.status(space, "web").get("sets", ())]

    packetstack.cluster.apply(stack("web", space, replicas=1, handover={"strategy": "Mirror"}, flowTable=SHORT))
    packetstack.wait(space, "web", 1)
    traffic = Traffic(
        packetstack.lab, [f"{VIP}:{PORT}"], [f"{VIP}:{UDP_PORT}"],
        connections=CONNECTIONS, udp_flows=FLOWS, request_interval_ms=1000, new_rate=20, cpu=1,
    )  # fmt: skip
    traffic.wait_open()
    packetstack.kubectl("scale", "packetstack", "web", "-n", space, "--replicas=2")
    eventually(lambda: sets() == [(1, "Draining"), (2, "Current")], WAIT_SECONDS, "the second set")
    eventually(lambda: packetstack.status(space, "web")["sets"][1]["buckets"] == 1024, WAIT_SECONDS, "its buckets")
    eventually(
        lambda: packetstack.status(space, "web")["sets"][0].get("connections", 0) > CONNECTIONS // 2,
        WAIT_SECONDS, "what the first set keeps",
    )  # fmt: skip
    assert len(packetstack.engines(space, "web")) == 3
    traffic.wait_open()
    outcome = traffic.stop()
    print(outcome)
    assert outcome.connections >= CONNECTIONS
    assert outcome.broken == 0, outcome.what_broke()
    eventually(lambda: sets() == [(2, "Current")], WAIT_SECONDS, "the end of the first set")
    packetstack.wait(space, "web", 2)
    assert packetstack.answers()
