"""The ownership state machine: a bucket's way from one queue to another while packets are on their way.

A model of one node in the smallest steps that can interleave: director runs on CPUs, rings, cores that take and
finish batches, the host side, and the agent that runs `Transfer`. Every method is one step; it does nothing and
returns False when it cannot happen now. Whoever drives the model chooses the order, so it can try all of them:
delays, duplicates, losses, deaths and restarts are nothing but orders of steps.

What the model takes for granted, because the kernel does it so
- A packet's director run, and the flush of what it redirects, happen on one CPU without a break that a process on
  that CPU could see. So `visit` on a CPU comes before or after a run, never inside.
- Frames from one CPU to one engine's receive ring stay in order; frames from different CPUs need not.
- Frames that a core transmits go through the host side on that core's CPU, in order.
- A flow's packets all arrive on one CPU.

What it checks at every step (`violations` stays empty, `check` raises AssertionError)
1. one owner: two cores never hold packets of one bucket that they are to handle;
2. no orphan: words and headers name engines that exist, at most one epoch apart;
3. order: each flow's packets leave the node in the order in which the director saw them;
4. accounting: packets seen = sent + dropped by reason + inside.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from packetstack_core.assignment import NOBODY, Owner


@dataclass(frozen=True, slots=True)
class Protections:
    """The parts of the fence. Each can be left out, to show that the checks notice."""

    markers: bool = True
    """Wait until the source has acknowledged."""
    every_cpu: bool = True
    """One marker for each CPU, not only one."""
    empty_transmit_ring: bool = True
    """The source acknowledges only when its transmit ring is empty."""
    parked_first: bool = True
    """The source acknowledges only when it has no parked packets of these buckets."""
    egress: bool = True
    """Markers through the source's way out before the release."""
    second_visit: bool = True
    """A visit of all CPUs before the release."""
    apart: bool = True
    """A queue does not give and get buckets in one fence: its parked packets would wait for each other."""
    quiet_core_change: bool = True
    """A queue changes its CPU only when the host side has sent on what it transmitted."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet with its stamp. `number` counts the packets of its flow."""

    flow: int
    number: int
    bucket: int
    epoch: int
    to: Owner


@dataclass(frozen=True, slots=True)
class Marker:
    """The frame of a fence; `queue` is fenced by it."""

    fence: int
    cpu: int
    queue: int


Frame = Packet | Marker


@dataclass(frozen=True, slots=True)
class Held:
    """A flow-table word, or the owner in a shard header (then `fenced` may be set)."""

    epoch: int
    owner: Owner
    fenced: bool = False


@dataclass
class Queue:
    """All of it lies in shared memory: it outlives the process that serves it, except `batch`."""

    cpu: int
    receive: deque[Frame] = field(default_factory=deque)
    park: deque[Packet] = field(default_factory=deque)
    transmit: deque[Packet] = field(default_factory=deque)
    batch: list[tuple[Frame, str]] = field(default_factory=list)
    """Frames taken, not yet published, with the verdict. They are still in their ring."""
    from_park: bool = False
    fence: int = 0
    fence_cpus: set[int] = field(default_factory=set)
    complete: int = 0
    acked: int = 0


@dataclass
class Engine:
    """`serving` is false from the death (or hang) of its datapath until its queues are adopted."""

    queues: list[Queue]
    serving: bool = True


@dataclass
class Transfer:
    """What the agent remembers of a fence. Lost when it dies."""

    fence: int
    sources: set[Owner]
    buckets: set[int]
    visited: set[int] = field(default_factory=set)


class Node:
    """One stack on one node."""

    def __init__(
        self,
        cpus: int = 2,
        buckets: int = 4,
        flows: int = 8,
        park_slots: int = 6,
        ring_slots: int = 12,
        protections: Protections | None = None,
    ) -> None:
        self.cpus, self.flows, self.park_slots, self.ring_slots = cpus, flows, park_slots, ring_slots
        self.protections = protections or Protections()
        self.words = [Held(0, NOBODY) for _ in range(buckets)]
        self.headers = [Held(0, NOBODY) for _ in range(buckets)]
        self.engines: dict[int, Engine] = {}
        self.slots_used = 0
        self.running: list[list[Packet]] = [[] for _ in range(cpus)]
        """CPU -> packets that the director has stamped, not yet in a ring."""
        self.ingress: defaultdict[tuple[int, int], deque[Frame]] = defaultdict(deque)
        """(CPU, slot) -> frames on their way to the engine."""
        self.egress: defaultdict[tuple[int, int], deque[Frame]] = defaultdict(deque)
        """(CPU, slot) -> frames on their way from the engine."""
        self.leaving: list[list[Packet]] = [[] for _ in range(cpus)]
        """CPU -> packets that the host side is sending on."""
        self.agent = True
        self.transfer: Transfer | None = None
        self.next_fence = 1
        self.fences: dict[int, frozenset[int]] = {}
        self.egress_seen: Counter[tuple[int, int]] = Counter()
        """(CPU, slot) -> fence of the last marker that came by."""
        self.sent_numbers: Counter[int] = Counter()
        self.wire: list[Packet] = []
        self.last_out: Counter[int] = Counter()
        self.drops: Counter[str] = Counter()
        self.violations: list[str] = []

    # ---- the director and the rings ---------------------------------------------------------------------------

    def cpu_of(self, flow: int) -> int:
        """The CPU that the card gives this flow to."""
        return flow % self.cpus

    def bucket_of(self, flow: int) -> int:
        """Flows of a bucket come from all CPUs."""
        return flow // self.cpus % len(self.words)

    def arrive(self, flow: int) -> bool:
        """The director sees the flow's next packet, reads the word once and stamps it."""
        self.sent_numbers[flow] += 1
        bucket = self.bucket_of(flow)
        word = self.words[bucket]
        if word.owner == NOBODY:
            self.drops["no_owner"] += 1
            return True
        packet = Packet(flow, self.sent_numbers[flow], bucket, word.epoch, word.owner)
        self.running[self.cpu_of(flow)].append(packet)
        return True

    def flush(self, cpu: int) -> bool:
        """The end of the CPU's run: what it redirected is now in rings and on the wire."""
        busy = bool(self.running[cpu] or self.leaving[cpu])
        for packet in self.running[cpu]:
            ring = self.ingress[cpu, packet.to.slot]
            if packet.to.slot not in self.engines:
                self.violations.append(f"{packet} was sent to an engine that is gone")
            if len(ring) < self.ring_slots:
                ring.append(packet)
            else:
                self.drops["ring_full"] += 1
        self.running[cpu] = []
        for packet in self.leaving[cpu]:
            if packet.number <= self.last_out[packet.flow]:
                self.violations.append(f"{packet} left after number {self.last_out[packet.flow]} of its flow")
            self.last_out[packet.flow] = max(packet.number, self.last_out[packet.flow])
            self.wire.append(packet)
        self.leaving[cpu] = []
        return busy

    def deliver(self, cpu: int, slot: int) -> bool:
        """The engine's program takes one frame and puts it into the queue that it names."""
        ring = self.ingress[cpu, slot]
        if not ring:
            return False
        frame = ring.popleft()
        queue = self.engines[slot].queues[frame.queue if isinstance(frame, Marker) else frame.to.queue]
        if len(queue.receive) < self.ring_slots:
            queue.receive.append(frame)
        elif isinstance(frame, Packet):
            self.drops["receive_full"] += 1
        return True

    def lose_marker(self, cpu: int, slot: int) -> bool:
        """A marker found a ring full."""
        ring = self.ingress[cpu, slot]
        if not ring or not isinstance(ring[-1], Marker):
            return False
        ring.pop()
        return True

    # ---- a core -------------------------------------------------------------------------------------------------

    def take(self, slot: int, index: int, from_park: bool, most: int = 4) -> bool:
        """The core begins a batch: looks at the shard headers and decides what is to be done with each frame."""
        queue = self._served(slot, index)
        if queue is None or queue.batch:
            return False
        source: deque[Packet] | deque[Frame] = queue.park if from_park else queue.receive
        parked = Counter(p.bucket for p in queue.park)
        room = self.park_slots - len(queue.park)
        batch: list[tuple[Frame, str]] = []
        for frame in list(source)[:most]:
            verdict = "marker"
            if isinstance(frame, Packet):
                verdict = self._admit(frame, waits_already=not from_park and parked[frame.bucket] > 0)
                if verdict == "park":
                    if from_park:
                        break  # all that is behind it waits too
                    if room == 0:
                        verdict = "park_full"
                    else:
                        parked[frame.bucket] += 1
                        room -= 1
            batch.append((frame, verdict))
        queue.batch, queue.from_park = batch, from_park
        self._check_one_owner()
        return bool(batch)

    def _admit(self, packet: Packet, waits_already: bool) -> str:
        header = self.headers[packet.bucket]
        if header == Held(packet.epoch, packet.to):
            return "park" if waits_already else "handle"
        if packet.epoch > header.epoch:
            return "park"
        self.violations.append(f"{packet} came to its engine when {header} had been released")
        return "late"

    def finish(self, slot: int, index: int) -> bool:
        """The core publishes its batch: all of it, or (if it dies before) nothing."""
        queue = self._served(slot, index)
        if queue is None or not queue.batch:
            return False
        for frame, verdict in queue.batch:
            (queue.park if queue.from_park else queue.receive).popleft()
            if isinstance(frame, Marker):
                self._marker(queue, frame)
            elif verdict == "handle":
                queue.transmit.append(frame)
            elif verdict == "park":
                queue.park.append(frame)
            else:
                self.drops[verdict] += 1
        queue.batch = []
        return True

    def _marker(self, queue: Queue, marker: Marker) -> None:
        if marker.fence <= queue.acked or marker.fence < queue.fence or marker.fence not in self.fences:
            return  # of an older attempt
        if marker.fence > queue.fence:
            queue.fence, queue.fence_cpus = marker.fence, set()
        queue.fence_cpus.add(marker.cpu)
        if len(queue.fence_cpus) == (self.cpus if self.protections.every_cpu else 1):
            queue.complete = marker.fence

    def acknowledge(self, slot: int, index: int) -> bool:
        """All markers came: from here on the queue touches the buckets no more."""
        queue = self._served(slot, index)
        if queue is None or queue.batch or queue.complete <= queue.acked or queue.complete not in self.fences:
            return False
        me = Owner(slot, index)
        mine = [b for b in self.fences[queue.complete] if self.headers[b].owner == me]
        if self.protections.empty_transmit_ring and queue.transmit:
            return False
        if self.protections.parked_first and any(p.bucket in mine for p in queue.park):
            return False
        for b in mine:
            self.headers[b] = replace(self.headers[b], fenced=True)
        queue.acked = queue.complete
        return True

    def transmit(self, slot: int, index: int) -> bool:
        """One frame from the transmit ring onto its way out, on the core's CPU."""
        queue = self._served(slot, index)
        if queue is None or not queue.transmit:
            return False
        self.egress[queue.cpu, slot].append(queue.transmit.popleft())
        return True

    def host(self, cpu: int, slot: int) -> bool:
        """The host side takes one frame of the engine and sends it on."""
        ring = self.egress[cpu, slot]
        if not ring:
            return False
        frame = ring.popleft()
        if isinstance(frame, Marker):
            self.egress_seen[cpu, slot] = frame.fence
        else:
            self.leaving[cpu].append(frame)
        return True

    def change_core(self, slot: int, index: int, cpu: int) -> bool:
        """Another core, on another CPU, serves the queue: between two batches."""
        queue = self._served(slot, index)
        if queue is None or queue.batch or queue.cpu == cpu:
            return False
        if self.protections.quiet_core_change and (
            queue.transmit or self.egress[queue.cpu, slot] or self.leaving[queue.cpu]
        ):
            return False
        queue.cpu = cpu
        return True

    def _served(self, slot: int, index: int) -> Queue | None:
        engine = self.engines.get(slot)
        if engine is None or not engine.serving or index >= len(engine.queues):
            return None
        return engine.queues[index]

    # ---- engines come and go --------------------------------------------------------------------------------------

    def add_engine(self, queues: int) -> int:
        """-> its slot. Slots are not used again."""
        self.slots_used += 1
        self.engines[self.slots_used] = Engine([Queue(q % self.cpus) for q in range(queues)])
        return self.slots_used

    def remove_engine(self, slot: int) -> bool:
        """Only an engine that owns nothing; then nothing of a packet may be left in it."""
        if any(held.owner.slot == slot for held in (*self.words, *self.headers)) or slot not in self.engines:
            return False
        if self.transfer is not None and any(s.slot == slot for s in self.transfer.sources):
            return False
        left = [p for p in self.inside() if p.to.slot == slot]
        if left:
            self.violations.append(f"engine {slot} is removed with {left} in it")
        for cpu in range(self.cpus):
            self.drops["removed"] += sum(isinstance(f, Packet) for f in self.ingress.pop((cpu, slot), ()))
            self.drops["removed"] += sum(isinstance(f, Packet) for f in self.egress.pop((cpu, slot), ()))
        for queue in self.engines.pop(slot).queues:
            self.drops["removed"] += sum(isinstance(f, Packet) for f in (*queue.receive, *queue.park, *queue.transmit))
        return True

    def die(self, slot: int) -> bool:
        """The datapath process ends at any instruction. A batch that was not published never happened."""
        engine = self.engines.get(slot)
        if engine is None or not engine.serving:
            return False
        engine.serving = False
        for queue in engine.queues:
            queue.batch = []
        return True

    def adopt(self, slot: int) -> bool:
        """Another process serves the queues, under their old identity."""
        engine = self.engines.get(slot)
        if engine is None or engine.serving:
            return False
        engine.serving = True
        return True

    # ---- the agent --------------------------------------------------------------------------------------------------

    def store_word(self, bucket: int, to: Owner) -> bool:
        """From here on the director sends the bucket's packets to its new owner."""
        word, header = self.words[bucket], self.headers[bucket]
        if not self.agent or self.transfer is not None or word != header or word.owner == to:
            return False
        if to != NOBODY and (to.slot not in self.engines or to.queue >= len(self.engines[to.slot].queues)):
            return False
        if self.protections.apart:
            under_way = [(h.owner, w.owner) for w, h in zip(self.words, self.headers, strict=True) if w != h]
            gives, gets = {source for source, _ in under_way}, {target for _, target in under_way}
            if (to in gives and to != NOBODY) or (word.owner in gets and word.owner != NOBODY):
                return False
        self.words[bucket] = Held(word.epoch + 1, to)
        return True

    def open_fence(self) -> bool:
        """For all buckets whose word and header differ, also those of an agent that died."""
        if not self.agent or self.transfer is not None:
            return False
        changed = [b for b in range(len(self.words)) if self.words[b] != self.headers[b]]
        for b in changed:
            if self.headers[b].owner == NOBODY:
                self.headers[b] = self.words[b]  # nobody handles its packets, so there is nothing to wait for
        buckets = {b for b in changed if self.words[b] != self.headers[b]}
        if not buckets:
            return bool(changed)
        self.transfer = Transfer(self.next_fence, {self.headers[b].owner for b in buckets}, buckets)
        self.fences = {self.next_fence: frozenset(buckets)}
        self.next_fence += 1
        return True

    def send_markers(self, cpu: int) -> bool:
        """One marker from this CPU to each source that has not acknowledged. May be repeated."""
        transfer = self._visiting(cpu)
        if transfer is None or self._acked(transfer):
            return False
        for source in sorted(transfer.sources, key=lambda o: (o.slot, o.queue)):
            ring = self.ingress[cpu, source.slot]
            if len(ring) < self.ring_slots:
                ring.append(Marker(transfer.fence, cpu, source.queue))
        return True

    def send_egress_markers(self, cpu: int) -> bool:
        """One marker from this CPU through each source engine's way out."""
        transfer = self._visiting(cpu)
        if transfer is None or not self._acked(transfer) or self._egress_done(transfer):
            return False
        for slot in {source.slot for source in transfer.sources}:
            self.egress[cpu, slot].append(Marker(transfer.fence, cpu, 0))
        return True

    def visit(self, cpu: int) -> bool:
        """The agent runs on this CPU once more: what the host side was sending on there is on the wire."""
        transfer = self._visiting(cpu)
        if transfer is None or not self._acked(transfer) or not self._egress_done(transfer):
            return False
        if cpu in transfer.visited:
            return False
        transfer.visited.add(cpu)
        return True

    def release(self) -> bool:
        """One bucket's header gets its new owner. The last one closes the fence."""
        transfer = self.transfer
        if transfer is None or not self._acked(transfer) or not self._egress_done(transfer):
            return False
        if self.protections.second_visit and len(transfer.visited) < self.cpus:
            return False
        bucket = min(transfer.buckets)
        transfer.buckets.remove(bucket)
        self.headers[bucket] = self.words[bucket]
        if not transfer.buckets:
            self.transfer = None
        self._check_one_owner()
        return True

    def agent_dies(self) -> bool:
        """Everything that is not in shared memory is forgotten."""
        was, self.agent, self.transfer = self.agent, False, None
        return was

    def agent_restarts(self) -> bool:
        """A new agent. Its first `open_fence` takes up what was left open."""
        was, self.agent = self.agent, True
        return not was

    def _visiting(self, cpu: int) -> Transfer | None:
        # A process gets onto the CPU only when no run is under way there.
        return None if self.running[cpu] or self.leaving[cpu] else self.transfer

    def _acked(self, transfer: Transfer) -> bool:
        if not self.protections.markers:
            return True
        return all(self.engines[s.slot].queues[s.queue].acked >= transfer.fence for s in transfer.sources)

    def _egress_done(self, transfer: Transfer) -> bool:
        if not self.protections.egress:
            return True
        return all(
            self.egress_seen[cpu, source.slot] == transfer.fence
            for source in transfer.sources
            for cpu in range(self.cpus)
        )

    # ---- checks -----------------------------------------------------------------------------------------------------

    def inside(self) -> Iterator[Packet]:
        """All packets between director and wire."""
        for packets in (*self.running, *self.leaving):
            yield from packets
        for frames in (*self.ingress.values(), *self.egress.values()):
            yield from (f for f in frames if isinstance(f, Packet))
        for engine in self.engines.values():
            for queue in engine.queues:
                yield from (f for f in (*queue.receive, *queue.park, *queue.transmit) if isinstance(f, Packet))

    def _check_one_owner(self) -> None:
        handlers: dict[int, Owner] = {}
        for slot, engine in self.engines.items():
            for index, queue in enumerate(engine.queues):
                for frame, verdict in queue.batch:
                    if verdict == "handle" and isinstance(frame, Packet):
                        first = handlers.setdefault(frame.bucket, Owner(slot, index))
                        if first != Owner(slot, index):
                            self.violations.append(f"bucket {frame.bucket} is changed by {first} and {slot}:{index}")

    def check(self) -> None:
        """Invariants 1 to 4. Raises AssertionError."""
        assert not self.violations, self.violations[0]
        for bucket, (word, header) in enumerate(zip(self.words, self.headers, strict=True)):
            for held in (word, header):
                assert held.owner == NOBODY or held.owner.slot in self.engines, f"bucket {bucket} is owned by {held}"
            assert word.epoch - header.epoch == (word.owner != header.owner), f"bucket {bucket}: {word}, {header}"
            assert not header.fenced or word != replace(header, fenced=False), f"bucket {bucket} is fenced for nothing"
        inside = Counter((p.flow, p.number) for p in self.inside())
        assert all(n == 1 for n in inside.values()), f"twice inside: {inside.most_common(1)}"
        seen, accounted = self.sent_numbers.total(), inside.total() + len(self.wire) + self.drops.total()
        assert seen == accounted, f"{seen} packets seen, {accounted} accounted for"

    def step_all(self) -> bool:
        """Every step that can happen now, once. -> did anything change?"""
        done = False
        for cpu in range(self.cpus):
            done |= self.flush(cpu)
            for slot in list(self.engines):
                done |= self.deliver(cpu, slot) | self.host(cpu, slot)
        for slot, engine in list(self.engines.items()):
            for index in range(len(engine.queues)):
                for from_park in (True, False):
                    done |= self.take(slot, index, from_park) and self.finish(slot, index)
                done |= self.finish(slot, index) | self.transmit(slot, index) | self.acknowledge(slot, index)
        return done

    def settle(self, rounds: int = 400) -> None:
        """Agent and engines come back, nothing new arrives: everything must come to rest. Raises AssertionError."""
        self.agent_restarts()
        for slot in self.engines:
            self.adopt(slot)
        for _ in range(rounds):
            done = self.step_all()
            if self.transfer is None:
                done |= self.open_fence()
            elif not done:
                for cpu in range(self.cpus):
                    done |= self.send_markers(cpu) | self.send_egress_markers(cpu) | self.visit(cpu)
                done |= self.release()
            if not done:
                break
        left = [b for b in range(len(self.words)) if self.words[b] != self.headers[b]]
        assert not left, f"buckets {left} are never released"
        assert not list(self.inside()), f"never handled: {list(self.inside())[:3]}"
        self.check()
