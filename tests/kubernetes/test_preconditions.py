"""What packets need of a node in a cluster: put back where it is the agent's, told by the stack's conditions where it is not."""

import json

from tests.waiting import eventually

from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, VIP, WAIT_SECONDS, Installed, stack
from .test_attachments import attached, definition

BRIDGE = "edge0"


def test_what_a_node_lacks_is_put_back_or_told_by_the_stack(
    packetstack: Installed, servers: Servers, space: str
) -> None:
    packetstack.cluster.apply(definition("edge-net", space, type="bridge", bridge=BRIDGE, ipam={}))
    packetstack.cluster.apply(stack("web", space, **attached("edge-net")))
    packetstack.wait(space, "web", 2)

    def node(command: str) -> str:
        return packetstack.lab.run("node", "sh", "-c", command).stdout

    def available() -> tuple[str, str]:
        return packetstack.condition(space, "web", "Available")

    traffic = Traffic(packetstack.lab, [f"{VIP}:{PORT}"], connections=100, new_rate=10)
    traffic.wait_open()
    end = json.loads(node(f"ip -j link show master {BRIDGE} up"))[0]["ifname"]
    for take, back in (
        (f"ip link set {end} down", f"ip -j link show {end} up"),
        (f"tc qdisc del dev {end} clsact", f"tc filter show dev {end} ingress | grep host_egress; true"),
    ):
        node(take)
        eventually(lambda back=back: node(back).strip() not in ("", "[{}]"), WAIT_SECONDS, f"{take} is put back")
    assert f"master {BRIDGE}" in node(f"ip link show {end}"), "what the plugin has made stays so"
    node("sysctl -qw net.ipv6.conf.all.forwarding=0")  # of no stack here
    node(f"ip address add {VIP}/32 dev lo")
    try:
        eventually(lambda: available() == ("False", "AddressTaken"), WAIT_SECONDS)
    finally:
        node(f"ip address del {VIP}/32 dev lo; sysctl -qw net.ipv6.conf.all.forwarding=1")
    eventually(lambda: available()[0] == "True", WAIT_SECONDS)
    assert packetstack.condition(space, "web", "Degraded")[0] == "False"
    traffic.stop()
    packetstack.scale(space, "web", 1)
