"""Engines on an interface that a CNI plugin has made, named by a NetworkAttachmentDefinition."""

import json
from typing import Any

import pytest
from tests.cluster.node import DEVICES, VETH_RESOURCE
from tests.waiting import eventually

from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, UDP_PORT, VIP, WAIT_SECONDS, Installed, stack


def definition(name: str, namespace: str, **plugin: object) -> dict[str, Any]:
    """A network that gives a pod one more interface."""
    config = {"cniVersion": "1.0.0", "name": name, **plugin}
    return {
        "apiVersion": "k8s.cni.cncf.io/v1",
        "kind": "NetworkAttachmentDefinition",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"config": json.dumps(config)},
    }


def attached(name: str, **changes: object) -> dict[str, object]:
    """The engine's part of a stack on this network."""
    shape = {"cores": 1, "queuesPerCore": 2, "memory": "256Mi"}
    return {"engine": shape | {"interface": {"attachment": {"networkAttachmentDefinition": name}}}, **changes}


def test_engines_on_attached_interfaces_are_scaled_without_a_broken_connection(
    packetstack: Installed, servers: Servers, space: str
) -> None:
    packetstack.cluster.apply(definition("edge-net", space, type="bridge", bridge="edge0", ipam={}))
    packetstack.cluster.apply(stack("web", space, **attached("edge-net")))
    packetstack.wait(space, "web", 2)
    engines = packetstack.cluster.get("packetengines", "-n", space)["items"]
    assert {e["status"]["interface"] for e in engines} == {"net1"}
    traffic = Traffic(
        packetstack.lab, [f"{VIP}:{PORT}"], [f"{VIP}:{UDP_PORT}"], connections=200, udp_flows=20, new_rate=10
    )
    traffic.wait_open()
    for replicas in (3, 1):
        packetstack.scale(space, "web", replicas)
    outcome = traffic.stop()
    print(outcome)
    assert outcome.broken == 0, outcome.what_broke()


def test_engines_on_devices_of_a_device_plugin_serve_until_there_is_none_left(
    packetstack: Installed, servers: Servers, space: str
) -> None:
    packetstack.cluster.node.offer_veths(DEVICES)
    network = definition("ports", space, type="host-device")
    network["metadata"] = {**network["metadata"], "annotations": {"k8s.v1.cni.cncf.io/resourceName": VETH_RESOURCE}}
    packetstack.cluster.apply(network)
    device = {"resourceName": VETH_RESOURCE, "networkAttachmentDefinition": "ports"}
    shape = {"cores": 1, "queuesPerCore": 2, "memory": "256Mi", "interface": {"devicePlugin": device}}
    packetstack.cluster.apply(stack("web", space, engine=shape))
    packetstack.wait(space, "web", 2)
    traffic = Traffic(packetstack.lab, [f"{VIP}:{PORT}"], connections=200, new_rate=10)
    traffic.wait_open()
    packetstack.kubectl("scale", "packetstack", "web", "-n", space, f"--replicas={DEVICES + 1}")

    def refused() -> bool:
        condition = packetstack.condition(space, "web", "CapacityAvailable")
        return condition == ("False", "NoFreeVF") and packetstack.status(space, "web")["readyReplicas"] == DEVICES

    eventually(refused, WAIT_SECONDS, "CapacityAvailable=False, NoFreeVF")
    assert len(packetstack.engines(space, "web")) <= DEVICES + 1, "no heap of pods that cannot run"
    packetstack.scale(space, "web", 1)
    packetstack.scale(space, "web", 2)  # on a device that another engine has had
    outcome = traffic.stop()
    print(outcome)
    assert outcome.broken == 0, outcome.what_broke()


@pytest.mark.parametrize(
    ("plugin", "said"),
    [({"type": "macvlan", "master": "up0"}, "use an attachment that makes a veth pair"), ({}, "edge-net")],
    ids=["no veth", "missing"],
)
def test_an_attachment_that_cannot_serve_is_told_in_a_condition(
    packetstack: Installed, space: str, plugin: dict[str, object], said: str
) -> None:
    if plugin:
        packetstack.cluster.apply(definition("edge-net", space, **plugin))
    packetstack.cluster.apply(stack("web", space, **attached("edge-net", replicas=1)))

    def told() -> bool:
        conditions = packetstack.status(space, "web").get("conditions", [])
        return any(said in c["message"] for c in conditions)

    eventually(told, WAIT_SECONDS, f'a condition with "{said}"')
