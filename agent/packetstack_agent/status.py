"""How a stack is: read from shared memory, maps and counters when somebody asks. Changes nothing."""

from collections import Counter

from packetstack_agent import draining, loading, networks, standings
from packetstack_agent.balancing import Balancers
from packetstack_agent.counting import add_drops, captures, link_drops
from packetstack_agent.director import Director
from packetstack_agent.engines import Engine
from packetstack_agent.firewall import Firewall
from packetstack_agent.health import Health
from packetstack_agent.managed import Managed
from packetstack_agent.natives import call, constant, ffi, lib, packed
from packetstack_agent.node import RunDirectory
from packetstack_agent.probes import Place
from packetstack_agent.scaling import Autoscalers
from packetstack_agent.shedding import Shedders, listener_names
from packetstack_agent.stacks import Stack
from packetstack_core import abi, standing
from packetstack_core.assignment import State
from packetstack_core.load import EngineLoad
from packetstack_core.verbs import Json


class Status:
    """What the agent shows."""

    def __init__(
        self,
        director: Director,
        health: Health,
        autoscalers: Autoscalers,
        balancers: Balancers,
        shedders: Shedders,
        firewall: Firewall,
        run: RunDirectory,
    ) -> None:
        self._director = director
        self._health = health
        self._autoscalers = autoscalers
        self._balancers = balancers
        self._shedders = shedders
        self._firewall = firewall
        self._run = run

    def of(self, managed: Managed) -> Json:
        """The resource with its `status`."""
        stack, spec = managed.stack, managed.stack.resource.spec
        stands = standings.standing(managed, self._run, self._firewall)
        pool, found = stands.pool, standing.conditions(stands)
        buckets = Counter(owner.slot for owner in pool.owners if owner is not None and owner.slot)
        flows = {e.slot: e.flows for e in pool.engines}
        load = managed.history.load(1.0)
        loads = {e.name: e for e in load.engines} if load is not None else {}
        shown = [
            engine_status(e, buckets, flows, loads.get(loading.name(e))) for _, e in sorted(managed.engines.items())
        ]
        status: Json = {
            "replicas": len(standing.staying(pool)),
            "readyReplicas": len(standing.serving(pool)),
            "updatedReplicas": len(standing.updated(pool)),
            "drainingReplicas": sum(e.state is State.DRAINING for e in managed.engines.values()),
            "flowTableGeneration": stack.epochs(),
            "configurationGeneration": stack.generation,
            "flows": stack.live(),
            "leaving": [
                {"address": str(a), "flows": n} for a, n in sorted(stack.leaving.items(), key=lambda x: packed(x[0]))
            ],
            "ready": standing.ready(stands),
            "conditions": [
                {"type": c.type, "status": c.status, "reason": str(c.reason), "message": c.message} for c in found
            ],
            "engines": shown,
            "owners": {str(slot): n for slot, n in sorted(buckets.items())},
            "drops": self._drops(managed),
            "backends": self._backends(managed),
            "capacity": standing.capacity(spec, _usable(stack)),
            "rebalance": self._balancers.of(managed).document(managed),
            "shedding": self._shedders.of(managed).document(listener_names(managed)),
            "handover": {"moved": managed.moved, "holdsMilliseconds": [round(n / 1e6, 3) for n in managed.holds_ns]},
        }
        if sets := draining.document(managed, stands):
            status["sets"] = sets
        autoscaler = self._autoscalers.of(managed)
        if autoscaler is not None and autoscaler.shown is not None:
            decided = autoscaler.document()
            status["autoscaling"] = decided["autoscaling"]
            status["conditions"] += decided["conditions"]
        return {**stack.resource.document(), "status": status}

    def _drops(self, managed: Managed) -> dict[str, dict[str, int]]:
        director = self.director_counters()
        engine, kernel = dict(managed.gone["engine"]), dict(managed.gone["kernel"])
        for e in managed.engines.values():
            if e.view is not None and not e.removing:
                add_drops(e, engine, kernel)
        for name, count in link_drops([networks.ROUTED, networks.DIRECTOR]).items():
            kernel[name] = kernel.get(name, 0) + count
        return {
            "director": {n.removeprefix("drop_"): v for n, v in director.items() if n.startswith("drop_")},
            "host": {n.removeprefix("drop_"): v for n, v in self.host_counters().items() if n.startswith("drop_")},
            "engine": engine,
            "kernel": kernel,
        }

    def director_counters(self) -> dict[str, int]:
        """All counters of the node's director."""
        out = ffi.new("uint64_t[]", constant("PS_D_COUNTERS"))
        call(lib().ps_director_counters, self._director.handle, out)
        names = abi.enum_names("ps_director_counter")
        return {names[i].removeprefix("PS_D_").lower(): int(out[i]) for i in range(len(out))}

    def host_counters(self) -> dict[str, int]:
        """What became of the engines' transmissions on this node."""
        out = ffi.new("uint64_t[]", constant("PS_H_COUNTERS"))
        call(lib().ps_host_counters, self._director.handle, out)
        names = abi.enum_names("ps_host_counter")
        return {names[i].removeprefix("PS_H_").lower(): int(out[i]) for i in range(len(out))}

    def _backends(self, managed: Managed) -> list[Json]:
        stack = managed.stack
        unwell = {place for (place, _), well in self._health.of(stack.name).items() if not well}
        weights = {
            (e.address, e.port): e.weight for li in stack.resource.spec.listeners for e in li.backends.endpoints or ()
        }
        rising = stack.rising()
        shown = []
        for place, (live, created) in stack.backend_flows().items():
            if place in weights or live:
                shown.append(
                    {
                        "address": str(place[0]),
                        "port": place[1],
                        "weight": weights.get(place),
                        "share": round(rising.get(place, 1.0), 3),
                        "healthy": place not in unwell,
                        "flows": live,
                        "flowsTotal": created,
                    }
                )
        return shown


def engine_status(engine: Engine, buckets: dict[int, int], flows: dict[int, int], load: EngineLoad | None) -> Json:
    """One engine: its cores and their queues. `load`: that of the last second, if it is known."""
    b = engine.blueprint
    status: Json = {
        "slot": b.slot,
        "name": b.name,
        "set": b.set,
        "state": str(engine.state),
        "ready": engine.ready,
        "buckets": buckets.get(b.slot, 0),
        "flows": flows.get(b.slot, 0),
        "pid": engine.pid,
        "initPid": engine.init.pid if engine.init is not None else 0,
        "namespace": b.namespace,
        "packetsPerSecond": 0.0,
        "bitsPerSecond": 0.0,
        "newFlowsPerSecond": 0.0,
        "dropRatio": 0.0,
        "busy": 0.0,
        "cores": [],
    }
    if engine.view is None:
        return status
    if load is not None:
        status |= {
            "packetsPerSecond": round(load.packets_per_second, 1),
            "bitsPerSecond": round(load.bits_per_second, 1),
            "newFlowsPerSecond": round(load.new_flows_per_second, 1),
            "dropRatio": round(load.drop_ratio, 6),
            "busy": round(load.utilization, 4),
        }
    status["captures"] = captures(engine)
    queues: dict[int, list[Json]] = {}
    for q in range(b.queues):
        view = engine.queue(q)
        queues.setdefault(engine.served_by(q), []).append(
            {
                "queue": q,
                "received": int(view.received),
                "forwarded": int(view.forwarded),
                "packetsPerSecond": round(load.queues[q].packets_per_second, 1) if load is not None else 0.0,
                "busy": round(load.queues[q].busy, 4) if load is not None else 0.0,
                "depth": int(view.depth),
                "parked": (view.park.producer - view.park.consumer) & 0xFFFFFFFF,
                "holds": int(view.holds),
                "holdNanoseconds": int(view.hold_ns),
                "holdMaximumMicroseconds": view.hold_max_ns / 1000,
            }
        )
    for c in range(b.cores):
        core = engine.core(c)
        status["cores"].append(
            {
                "core": c,
                "cpu": int(core.cpu),
                "busy": round(load.cores[c], 4) if load is not None else 0.0,
                "queues": queues.get(c, []),
            }
        )
    return status


def _usable(stack: Stack) -> set[Place]:
    """Backends that may get new flows: those with a weight that do not fail their probes."""
    return {place for listener in stack.resource.spec.listeners for place, _ in stack.usable(listener)}
