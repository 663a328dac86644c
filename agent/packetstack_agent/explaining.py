"""Where a packet of a flow goes, and why: what directors and engines would do with it, in words. Changes nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from packetstack_agent.errors import AgentError
from packetstack_agent.natives import ffi, lib, packed, unpacked, wire
from packetstack_agent.stacks import Stack
from packetstack_core import abi
from packetstack_core.resources import Listener
from packetstack_core.values import Address
from packetstack_core.verbs import Json

_NUMBERS = {"tcp": 6, "udp": 17}


@dataclass(frozen=True)
class Flow:
    """A flow, as a client's packets name it."""

    protocol: str
    """Name of the protocol in lower case."""
    client: Address
    client_port: int
    address: Address
    """The virtual one."""
    port: int

    @classmethod
    def of(cls, protocol: str, source: str, sport: int, destination: str, dport: int) -> "Flow":
        """The flow that a person has named; AgentError if that is no flow."""
        said = f'flow "{protocol} {source} {destination}"'
        try:
            client, address = ip_address(source), ip_address(destination)
            _NUMBERS[protocol.lower()]
        except (ValueError, KeyError):
            raise AgentError(f'{said}: not a flow; use "tcp 10.0.0.1:40000 192.0.2.10:80"') from None
        if client.version != address.version:
            raise AgentError(f"{said}: is of two families; use two addresses of one")
        return cls(protocol.lower(), client, sport, address, dport)

    def hash(self, key: tuple[int, int]) -> int:
        """Hash of the flow, as directors compute it with the stack's secret."""
        ports = wire(self.client_port), wire(self.port)
        number = _NUMBERS[self.protocol]
        return int(lib().ps_flow_hash(*key, packed(self.client), packed(self.address), *ports, number))


def explain(stack: Stack, pods: Mapping[int, str], flow: Flow) -> Json:
    """The flow's hash, bucket, owner and entry, and in `why` what becomes of its next packet.

    `pods`: by slot, names of the engines that have one.
    """
    listener = _listener(stack, flow)
    if listener is None:
        place = f"{flow.protocol.upper()} {flow.address} port {flow.port}"
        return {"why": f"no listener of stack {stack.name} has {place}; not our traffic"}
    value = flow.hash(stack.key)
    bucket = value & (stack.buckets - 1)
    word = stack.words()[bucket]
    slot = word >> 22 & 1023
    owner = _engine(pods, slot, word >> 16 & 63) | {"epoch": word >> 32}
    own, kept = stack.flows(bucket)
    entry, keeper = _entry(own, flow), None  # what both have the owner has claimed
    if entry is None and (entry := _entry(kept, flow)) is not None:
        keeper = _engine(pods, word >> 6 & 1023, word & 63)
    way = f"hash {value:016x} -> bucket {bucket} -> engine {pods.get(slot) or slot}"
    allowed = listener.allowed_sources
    if allowed is not None and not any(flow.client in network for network in allowed):
        why = f"{flow.client} is not in allowedSources of listener {listener.name}: dropped as not_allowed"
    elif not slot:
        why = f"bucket {bucket} has no owner: packets are dropped as no_owner"
    elif keeper is not None:
        name = keeper.get("pod") or keeper["slot"]
        why = f"{way}, which rejects it, and a copy to engine {name} of the set before, which keeps this flow"
    elif entry is not None:
        why = f"{way}, which keeps this flow"
    elif not stack.usable(listener):
        why = f"listener {listener.name} has no healthy backend: new flows are dropped as no_backend"
    else:
        why = f"{way}; no such flow yet, {_choice(stack, listener, value, flow.client)}"
    return {
        "hash": f"{value:016x}",
        "bucket": bucket,
        "owner": owner,
        "keeper": keeper,
        "listener": listener.name,
        "flow": entry,
        "why": why,
    }


def _engine(pods: Mapping[int, str], slot: int, queue: int) -> Json:
    return {"slot": slot, "queue": queue} | ({"pod": pods[slot]} if slot in pods else {})


def _listener(stack: Stack, flow: Flow) -> Listener | None:
    for listener in stack.resource.spec.listeners:
        if (listener.address, listener.port, listener.protocol.lower()) == (flow.address, flow.port, flow.protocol):
            return listener
    return None


def _entry(entries: Iterable[Any], flow: Flow) -> Json | None:
    """The flow's entry, if it is among these."""
    names = abi.enum_names("ps_flow_state")
    for entry in entries:
        if (
            unpacked(bytes(ffi.buffer(entry.client))) == flow.client
            and wire(entry.client_port) == flow.client_port
            and wire(entry.vip_port) == flow.port
            and bool(entry.flags & 1) == (flow.protocol == "udp")
            and unpacked(bytes(ffi.buffer(entry.vip))) == flow.address
        ):
            snat, backend = (unpacked(bytes(ffi.buffer(a))) for a in (entry.snat, entry.backend))
            return {
                "state": names[entry.state].removeprefix("PS_FLOW_").lower(),
                "backend": f"{backend} port {wire(entry.backend_port)}",
                "snat": f"{snat} port {wire(entry.snat_port)}",
            }
    return None


def _choice(stack: Stack, listener: Listener, flow_hash: int, client: Address) -> str:
    """How a backend is found for a new flow."""
    how = f"{listener.balancing} would choose" if listener.session_affinity == "None" else "its client's backend is"
    usable, chosen = len(stack.usable(listener)), stack.choice(listener, flow_hash, client)
    if chosen is None:
        return f"{how} one of {usable} backends"
    return f"{how} {chosen[0]} port {chosen[1]}, one of {usable}"
