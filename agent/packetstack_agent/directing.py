"""What the director knows of one stack: its listeners, who may send to them, and its SNAT addresses."""

from collections.abc import Iterable
from ipaddress import ip_network
from typing import Any

from packetstack_agent.natives import PROTOCOLS, call, constant, ffi, lib, packed, unpacked, wire
from packetstack_core.resources import PacketStack
from packetstack_core.values import Address, Network

Listening = tuple[Address, int, str]
"""Address, port and protocol of a listener."""


class Directions:
    """One stack's entries in the director's maps. Functions block for microseconds."""

    def __init__(self, director: Any, key: tuple[int, int], offset: int, buckets: int, index: int) -> None:
        """`director`: `struct ps_director *`. `offset`: of the stack's words in the flow tables. `index`: its number."""
        self._director = director
        self._target = {"key0": key[0], "key1": key[1], "offset": offset, "mask": buckets - 1, "stack": index}
        self._listeners: set[Listening] = set()
        self.snat: set[Address] = set()
        """Addresses whose packets are directed to the stack's engines."""
        self._allowed: dict[Listening, frozenset[Network]] = {}
        """Sources of listeners that take packets of these alone."""

    def become(self, resource: PacketStack, snat: set[Address]) -> None:
        """Direct packets of the resource's listeners and of these SNAT addresses, and no others."""
        target = ffi.new("struct ps_target *", self._target)
        listeners = resource.listening()
        allowed: dict[Listening, frozenset[Network]] = {
            (li.address, li.port, li.protocol): frozenset(li.allowed_sources)
            for li in resource.spec.listeners
            if li.allowed_sources
        }
        for address in snat - self.snat:
            call(lib().ps_director_snat, self._director, packed(address), target)
        left = self._sources() if allowed.keys() - self._allowed.keys() else {}  # by an earlier agent
        for place in listeners:
            if place not in self._listeners or self._allowed.get(place) != allowed.get(place):
                had = self._allowed.pop(place, None) or left.get(place, frozenset())
                self._direct(place, target, had, allowed.get(place, frozenset()))
        self._withdraw(self._listeners - listeners, self.snat - snat)
        self._listeners, self.snat = listeners, snat

    def let_go(self, snat: Iterable[Address]) -> None:
        """Direct packets to these SNAT addresses no more."""
        gone = set(snat)
        self._withdraw((), gone)
        self.snat -= gone

    def withdraw(self) -> None:
        """Direct nothing any more."""
        try:
            self._withdraw(self._listeners, self.snat)
        finally:
            self._listeners, self.snat = set(), set()

    def _direct(self, place: Listening, target: Any, had: frozenset[Network], allowed: frozenset[Network]) -> None:
        """Who may send before and after may always: sources come before their listener asks for them, and go after."""
        for source in allowed - had:
            self._allow(place, source, True)
        target.flags = constant("PS_TARGET_ALLOWED") if allowed else 0
        self._listen(place, target)
        for source in had - allowed:
            self._allow(place, source, False)
        if allowed:
            self._allowed[place] = allowed

    def _listen(self, place: Listening, target: Any) -> None:
        address, port, protocol = place
        call(lib().ps_director_listener, self._director, packed(address), wire(port), PROTOCOLS[protocol], target)

    def _allow(self, place: Listening, source: Network, allow: bool) -> None:
        entry = ffi.new("struct ps_allowed *", {"port": wire(place[1]), "protocol": PROTOCOLS[place[2]]})
        ffi.memmove(entry.address, packed(place[0]), 16)
        ffi.memmove(entry.source, packed(source.network_address), 16)
        entry.prefix = source.prefixlen
        call(lib().ps_director_allow, self._director, entry, allow)

    def _sources(self) -> dict[Listening, frozenset[Network]]:
        """Allowed sources by listener, as the director has them: of all stacks."""
        entries = ffi.new("struct ps_allowed[]", 1 << 16)
        names = {number: name for name, number in PROTOCOLS.items()}
        found: dict[Listening, set[Network]] = {}
        for i in range(lib().ps_director_allowed(self._director, entries, len(entries))):
            entry = entries[i]
            place = (unpacked(bytes(entry.address)), wire(entry.port), names[entry.protocol])
            source = ip_network(f"{unpacked(bytes(entry.source))}/{entry.prefix}")
            found.setdefault(place, set()).add(source)
        return {place: frozenset(sources) for place, sources in found.items()}

    def _withdraw(self, listeners: Iterable[Listening], snat: Iterable[Address]) -> None:
        for place in listeners:
            self._listen(place, ffi.NULL)
            for source in self._allowed.pop(place, frozenset()):
                self._allow(place, source, False)
        for address in snat:
            call(lib().ps_director_snat, self._director, packed(address), ffi.NULL)
