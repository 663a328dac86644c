"""Services become backends as kube-proxy would see them, and pods are read as a kubelet reports them."""

import pytest

from packetstack_core.reading import parse
from packetstack_operator import backends, claims, observing
from packetstack_operator.observing import Slice, World


def stack(protocol="TCP", address="192.0.2.10", snat="192.0.2.64/28"):
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketStack",
        "metadata": {"name": "edge", "namespace": "shop", "uid": "1"},
        "spec": {
            "listeners": [
                {
                    "name": "web",
                    "address": address,
                    "protocol": protocol,
                    "port": 443,
                    "backends": {"service": {"name": "web", "port": 8443}},
                }
            ],
            "snat": {"addresses": [snat]},
        },
    }


def endpoint(address, **conditions):
    return {"addresses": [address], "conditions": conditions}


def endpoint_slice(*endpoints, family="IPv4", port=9443, name="https", protocol="TCP"):
    ports = [{"name": name, "protocol": protocol, "port": port}]
    return Slice.of({"addressType": family, "endpoints": list(endpoints), "ports": ports})


def listed(raw, slices, ports=None):
    ports = {(8443, "TCP"): "https", (8443, "UDP"): "https"} if ports is None else ports
    world = World(raw, "i", services={"web": ports} if ports else {}, slices={"web": slices})
    listeners, problems = backends.resolve(parse(raw), world)
    endpoints = listeners[0].backends.endpoints
    return [(str(e.address), e.port, e.weight) for e in endpoints], problems


READY = {"ready": True, "serving": True, "terminating": False}
LEAVING = {"ready": False, "serving": True, "terminating": True}
UNREADY = {"ready": False, "serving": False, "terminating": False}


def test_ready_endpoints_are_backends_in_order_of_their_addresses():
    found = endpoint_slice(
        endpoint("10.0.0.20", **READY), endpoint("10.0.0.3", **READY), endpoint("10.0.0.4", **UNREADY)
    )
    assert listed(stack(), [found]) == ([("10.0.0.3", 9443, 1), ("10.0.0.20", 9443, 1)], [])


def test_a_terminating_tcp_backend_keeps_its_flows_and_gets_no_more():
    found = endpoint_slice(endpoint("10.0.0.3", **LEAVING), endpoint("10.0.0.4", **READY))
    assert listed(stack(), [found])[0] == [("10.0.0.3", 9443, 0), ("10.0.0.4", 9443, 1)]


def test_a_terminating_udp_backend_is_left_out():
    found = endpoint_slice(endpoint("10.0.0.3", **LEAVING), endpoint("10.0.0.4", **READY), protocol="UDP")
    assert listed(stack("UDP"), [found])[0] == [("10.0.0.4", 9443, 1)]


def test_conditions_that_are_absent_mean_ready():
    assert listed(stack(), [endpoint_slice({"addresses": ["10.0.0.3"]})])[0] == [("10.0.0.3", 9443, 1)]


def test_an_endpoint_in_two_slices_is_one_backend():
    slices = [endpoint_slice(endpoint("10.0.0.3", **LEAVING)), endpoint_slice(endpoint("10.0.0.3", **READY))]
    assert listed(stack(), slices)[0] == [("10.0.0.3", 9443, 1)]


def test_only_the_listeners_family_counts():
    slices = [
        endpoint_slice(endpoint("10.0.0.3", **READY)),
        endpoint_slice(endpoint("2001:db8::3", **READY), family="IPv6"),
        endpoint_slice(endpoint("web.example", **READY), family="FQDN"),
    ]
    assert listed(stack(), slices)[0] == [("10.0.0.3", 9443, 1)]
    raw = stack(address="2001:db8:1::10", snat="2001:db8:1::40/122")
    assert listed(raw, slices)[0] == [("2001:db8::3", 9443, 1)]


def test_ports_are_found_by_the_name_of_the_services_port():
    slices = [endpoint_slice(endpoint("10.0.0.3", **READY), name="metrics", port=1)]
    assert listed(stack(), slices) == ([], [])
    slices = [endpoint_slice(endpoint("10.0.0.3", **READY), name=None, port=7)]
    assert listed(stack(), slices, {(8443, "TCP"): ""})[0] == [("10.0.0.3", 7, 1)]


def test_what_is_wrong_with_a_service_is_said():
    assert listed(stack(), [], {})[1] == ["listener web: service web is not there; create it, or name another"]
    assert listed(stack(), [], {(80, "TCP"): ""})[1] == [
        "listener web: service web has no TCP port 8443; use one that it has"
    ]


def test_addresses_that_packets_cannot_be_sent_to_are_left_out():
    own = [endpoint(a, **READY) for a in ("127.0.0.1", "192.0.2.10", "192.0.2.65", "10.0.0.3")]
    assert listed(stack(), [endpoint_slice(*own)])[0] == [("10.0.0.3", 9443, 1)]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, True),
        ({"ownerReferences": [{"uid": "1", "controller": True}]}, True),
        ({"ownerReferences": [{"uid": "2", "controller": True}]}, False),
        ({"ownerReferences": [{"uid": "2"}]}, True),
    ],
)
def test_orphans_are_taken_in_and_others_children_are_left_alone(meta, said):
    assert observing.owned_by({"metadata": meta}, "1") is said


def test_a_pod_past_its_grace_period_is_dead_though_its_node_never_said_so():
    pod = {"metadata": {"deletionTimestamp": "2026-01-01T00:01:00Z"}, "status": {"phase": "Running"}}
    end = observing.seconds("2026-01-01T00:01:00Z")
    assert not observing.dead(pod, end + observing.OVERDUE_SECONDS)
    assert observing.dead(pod, end + observing.OVERDUE_SECONDS + 1)


def test_engines_are_found_by_the_mac_that_their_node_reports():
    engines = [{"id": 1, "state": "Active"}, {"id": 2, "state": "Starting"}]
    reported = [{"id": 1, "name": "edge-1", "mac": "02::1"}, {"id": 2, "name": "edge-2", "mac": "02::1"}]
    reported += [{"id": 3, "name": "edge-3"}]
    former = {"node": "node-8", "engines": [{"id": 1, "name": "edge-1", "mac": "02::9"}]}
    table = {
        "metadata": {"namespace": "shop", "name": "edge"},
        "spec": {"node": "node-9", "engines": engines},
        "status": {"nodes": [former, {"node": "node-9", "engines": reported}]},
    }
    found = claims.holders(table)
    assert set(found) == {("node-9", "02::1")}
    older, younger = sorted(found["node-9", "02::1"])
    assert (older.pod, younger.pod) == ("edge-1", "edge-2")
    assert claims.holders({"metadata": table["metadata"]}) == {}


def named(*addresses, name="edge", made="2026-01-01T00:00:00Z", owners="", snat=()):
    spec = {"listeners": [{"address": a} for a in addresses], "snat": {"addresses": list(snat)}, "owners": owners}
    return {"metadata": {"namespace": "shop", "name": name, "creationTimestamp": made}, "spec": spec}


def conflict(mine, *others, table=None):
    found = [claims.claims(raw) for raw in others]
    return claims.conflict(mine, table, lambda block: [c for f in found for c in f.get(block, ())])


OLDER = "2025-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("mine", "theirs", "address"),
    [
        (named("192.0.2.1"), named("192.0.2.1", name="a", made=OLDER), "192.0.2.1"),
        (named("192.0.2.1"), named("192.0.2.2", name="a", made=OLDER), None),
        (named("192.0.2.1"), named(snat=["192.0.0.0/22"], name="a", made=OLDER), "192.0.2.1"),
        (named(snat=["192.0.2.0/23"]), named("192.0.3.9", name="a", made=OLDER), "192.0.3.9"),
        (named(snat=["192.0.2.0/30"]), named(snat=["192.0.2.4/30"], name="a", made=OLDER), None),
        (named("2001:db8::1"), named(snat=["2001:db8::/126"], name="a", made=OLDER), "2001:db8::1"),
        (named("::c000:201"), named("192.0.2.1", name="a", made=OLDER), None),
        (named("192.0.2.1"), named("192.0.2.1", made=OLDER), None),
        (named("192.0.2.1", "nonsense"), named("nonsense", name="a", made=OLDER), None),
    ],
)
def test_addresses_of_two_stacks_conflict_when_one_is_in_both(mine, theirs, address):
    found = conflict(mine, theirs)
    assert (found and found.address) == address


def test_a_snat_prefix_that_grows_is_held_only_as_far_as_packets_flow_to_it():
    table = named(snat=["192.0.2.0/30"], owners="x")
    older = named("192.0.2.6", name="a", made=OLDER)
    assert conflict(named(snat=["192.0.2.0/30"]), older, table=table) is None
    assert conflict(named(snat=["192.0.2.0/29"]), older, table=table).fresh
