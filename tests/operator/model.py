"""A small cluster in memory: what the operator writes, and what a kubelet and an agent make of it, step by step.

It refuses what may never be asked for, so that any sequence of steps is a test.
"""

import copy
import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

from packetstack_agent.cluster import power_of_two_below
from packetstack_core import kinds, shards
from packetstack_core.kinds import FlowTable
from packetstack_core.reasons import ConditionReason, EventReason, why_not
from packetstack_operator import claims, deciding, observing, pods
from packetstack_operator.keeping import MAYBE_TAKEN
from packetstack_operator.observing import Memory, World

BUCKETS = 256
ORPHAN_SECONDS = 60.0
"""As in packetstack_agent/cluster.py."""
NODE = "node-0"


class Conflict(Exception):
    """Written from something older than what is there."""


def check_reasons(decision):
    """Each condition has a reason of the list that says what it means there; an event's type is that of its reason."""
    for write in decision.writes:
        for c in write.body.get("status", {}).get("conditions", ()):
            problem = why_not(c["type"], c["status"], ConditionReason(c["reason"]))
            assert not problem, problem
    for event in decision.events:
        assert isinstance(event.reason, EventReason | ConditionReason), event


class Model:
    def __init__(self, replicas=1, **spec):
        self.now = 1_800_000_000.0
        self.objects = {}
        self.version = 0
        self.memory = Memory()
        self.image = "localhost/packetstack:1"
        self.services, self.slices = {}, {}
        self.events = []
        self.writes = 0
        self.reads = 0
        self.room = 100
        self.refuse = None
        self.nodes = [NODE]
        self.words = [0] * BUCKETS
        """Engine by bucket, as packets see it."""
        self.followed = self.now
        """When the node's agent last had a table."""
        self.attached = {}
        """Engine -> UID of its pod."""
        self.stuck = set()
        """Engines whose datapath does not serve."""
        self.lost = set()
        """Engines that were detached with their buckets, since they did not serve."""
        self.kept = [0] * BUCKETS
        """Engine by bucket that keeps connections of before."""
        self.silent_since = self.now
        """When the quietest of those was seen last."""
        self.set_of = {}
        """Engine -> its set."""
        self.layouts = {}
        """Image -> shard layout of its build, where that is not the first one."""
        self.macs = {}
        """Engine -> MAC of its interface."""
        self.firewall = ""
        """What the agent says of its node's packet filter."""
        self.neighbours = {}
        self.proposal = None
        """Of the stack's rebalancer."""
        self.loads = {}
        """Engine -> cores."""
        self.others = []
        """Resources and flow tables of other stacks."""
        self.ends = False
        """The stack is being deleted."""
        self.put(
            {
                "apiVersion": "packetstack.io/v1alpha1",
                "kind": "PacketStack",
                "metadata": {"name": "edge", "namespace": "shop"},
                "spec": {
                    "replicas": replicas,
                    "flowTable": {"buckets": BUCKETS},
                    "listeners": [
                        {
                            "name": "web",
                            "address": "192.0.2.10",
                            "port": 80,
                            "backends": {"endpoints": [{"address": "10.1.0.5", "port": 80}]},
                        }
                    ],
                    "snat": {"addresses": ["192.0.2.64/28"]},
                    **spec,
                },
            }
        )

    # ---- the API server

    def put(self, body):
        """Create or replace, as the API server would number it."""
        at = (body["kind"], body["metadata"]["name"])
        old = self.objects.get(at)
        self.version += 1
        meta = body["metadata"]
        meta["resourceVersion"] = str(self.version)
        if old is None:
            meta.setdefault("uid", f"{self.version:08x}-0000")
            meta["generation"] = 1
        elif old.get("spec") != body.get("spec"):
            meta["generation"] = old["metadata"]["generation"] + 1
        self.objects[at] = body
        return body

    def change(self, at, change):
        body = copy.deepcopy(self.objects[at])
        change(body)
        return self.put(body)

    def of(self, kind):
        return [o for (k, _), o in sorted(self.objects.items()) if k == kind]

    def get(self, kind, name="edge"):
        return self.objects.get((kind, name))

    @property
    def stack(self):
        return self.objects["PacketStack", "edge"]

    @property
    def status(self):
        return self.stack.get("status", {})

    def condition(self, kind):
        return next(c for c in self.status["conditions"] if c["type"] == kind)

    def set_spec(self, **fields):
        self.change(("PacketStack", "edge"), lambda b: b["spec"].update(fields))

    def table(self):
        raw = self.get("FlowTable")
        return kinds.read(FlowTable, raw) if raw else None

    def do(self, write):
        self.writes += 1
        at = (write.kind, write.name)
        body = json.loads(json.dumps(write.body))
        old = self.objects.get(at)
        if write.verb == "delete":
            return self._delete(at, old, body)
        assert body["metadata"]["namespace"] == "shop"
        if write.verb == "create":
            if old is not None:
                raise Conflict
            if write.kind == "FlowTable":
                self._check_table(None, body)
                return self.put(body)
            if write.kind == "Pod":
                body["status"] = {"phase": "Pending"}
            self.put(body)
            return None
        if write.subresource:
            assert old is not None, "status of what is not there"
            return self.change(at, lambda b: b.update(status=_merged(b.get("status", {}), body["status"])))
        if write.verb == "replace":
            if old is None or old["metadata"]["resourceVersion"] != body["metadata"].pop("resourceVersion"):
                raise Conflict
            body["spec"] = {k: v for k, v in body["spec"].items() if v is not None}
            self._check_table(old, body)
        new = copy.deepcopy(old) if old is not None else {}
        new["metadata"] = {**new.get("metadata", {}), **_joined(new.get("metadata", {}), body["metadata"])}
        for part in ("apiVersion", "kind", "spec"):
            if part in body:
                new[part] = body[part]
        return self.put(new)

    def _delete(self, at, old, body):
        assert set(body) == {"preconditions"}, "never deletes by force"
        if old is None or old["metadata"]["uid"] != body["preconditions"]["uid"]:
            return
        if at[0] == "Pod":
            number = observing.number_of(old)
            if not observing.dead(old, self.now):
                # What does not serve is detached at once, and others take its buckets then.
                assert number not in self.words or number in self.lost, "never deletes an engine that packets reach"
                assert number not in self.kept or number in self.lost, "never deletes an engine that keeps connections"
                assert number not in self.attached, "never deletes an engine that is attached"
            self.delete_pod(at[1])
        else:
            del self.objects[at]

    def _check_table(self, old, body):
        new = kinds.read(FlowTable, body).spec
        ids = {e.id for e in new.engines}
        before = {e["id"]: e for e in old["spec"]["engines"]} if old else {}
        for engine in new.engines:
            if engine.state == "Pending" and engine.id not in before and old is not None:
                assert engine.id not in self.words, "never gives a number that packets still reach"
                there = self.get("Pod", engine.name)
                assert there is None or not observing.owned_by(there, self.stack["metadata"]["uid"])
        for number, engine in before.items():
            pod = self.get("Pod", engine["name"])
            alive = pod is not None and not observing.dead(pod, self.now) and engine.get("podUid")
            said = [e for n in old.get("status", {}).get("nodes", ()) for e in n["engines"] if e["id"] == number]
            # One that does not serve cannot hand over; should it serve by now, the agent has it hand over first.
            given_up = not any(e["ready"] for e in said) and number not in {o.slot for o in new.owner_ids()}
            if number not in ids and alive and not self.ends and not given_up and pod["spec"].get("nodeName") == NODE:
                assert number not in self.words, "never takes an engine away that packets reach"
                assert number not in self.kept, "never takes an engine away that keeps connections"
        for owner in new.owner_ids():
            if owner.slot in ids:
                engine = next(e for e in new.engines if e.id == owner.slot)
                assert owner.queue < engine.queues

    # ---- the operator

    def world(self):
        uid = self.stack["metadata"]["uid"]
        labelled = [o for o in self.objects.values() if o["metadata"].get("labels", {}).get(pods.STACK) == "edge"]
        ours = [o for o in labelled if observing.owned_by(o, uid)]
        world = World(
            stack=self.stack,
            image=self.image,
            table=self.get("FlowTable"),
            pods=tuple(o for o in ours if o["kind"] == "Pod"),
            engines=tuple(self.of("PacketEngine")),
            budget=next((o for o in ours if o["kind"] == "PodDisruptionBudget"), None),
            services=self.services,
            slices=self.slices,
            neighbours=self.neighbours,
            conflict=claims.conflict(self.stack, self.get("FlowTable"), self._claims),
            proposal=self.proposal,
            loads=self.loads,
            memory=self.memory,
        )
        asked = observing.names_to_verify(world)
        self.reads += len(asked)
        return observing.with_looked_up(world, {at: self.objects[at] for at in asked if at in self.objects})

    def _claims(self, block):
        return [c for raw in (*self.others, *self.objects.values()) for c in claims.claims(raw).get(block, ())]

    def operator(self, most=None):
        """One look. With `most` it is killed after so many writes, and starts again with nothing in its mind."""
        decision = deciding.decide(copy.deepcopy(self.world()), self.now)
        self.memory = decision.memory
        check_reasons(decision)
        write = None
        try:
            for n, write in enumerate(decision.writes):
                if n == most:
                    self.memory = Memory()
                    return decision
                self.do(write)
        except Conflict:
            if write.verb == "create" and write.kind in MAYBE_TAKEN:
                self.memory = replace(self.memory, taken=self.memory.taken | {(write.kind, write.name)})
                self.events += decision.events
            return decision
        self.events += decision.events
        return decision

    # ---- kubelet and scheduler

    def delete_pod(self, name):
        """As kubectl delete does: graceful where it runs."""
        pod = self.objects["Pod", name]
        if not pod["spec"].get("nodeName") or observing.phase(pod) in ("Failed", "Succeeded"):
            self.vanish(name)
        elif not observing.terminating(pod):
            self.change(("Pod", name), lambda b: b["metadata"].update(deletionTimestamp=_time(self.now + 60)))

    def vanish(self, name):
        """The pod and its interface are gone at once."""
        del self.objects["Pod", name]

    def kubelet(self):
        placed = sum(bool(p["spec"].get("nodeName")) for p in self.of("Pod"))
        for pod in self.of("Pod"):
            at = ("Pod", pod["metadata"]["name"])
            deleted = pod["metadata"].get("deletionTimestamp")
            if deleted:
                released = self.attached.get(observing.number_of(pod)) != pod["metadata"]["uid"]
                if released or self.now >= observing.seconds(deleted):
                    self.vanish(at[1])
            elif not pod["spec"].get("nodeName"):
                node = self._node_for(pod) if placed < self.room else None
                if node:
                    self.change(at, lambda b, node=node: (b["spec"].update(nodeName=node), b.update(status=_waits())))
                    placed += 1
                elif all(c["type"] != "PodScheduled" for c in pod["status"].get("conditions", ())):
                    why = {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/1 nodes are available: 1 Insufficient cpu.",
                        "lastTransitionTime": _time(self.now),
                    }
                    self.change(at, lambda b, why=why: b["status"].setdefault("conditions", []).append(why))
            elif observing.phase(pod) == "Pending":
                if self.refuse:
                    self.change(at, lambda b: b.update(status={"phase": "Failed", "reason": self.refuse}))
                else:
                    self.change(at, lambda b: b["status"].update(_runs(self.now)))

    def _node_for(self, pod):
        affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
        wanted = {v for t in terms for f in t["matchFields"] for v in f["values"]}
        return next((n for n in self.nodes if not wanted or n in wanted), None)

    # ---- the agent of the table's node

    def agent(self, batch=100):
        table = self.table()
        here = {p["metadata"]["uid"] for p in self.of("Pod")}
        self.attached = {i: uid for i, uid in self.attached.items() if uid in here}
        if table is None or table.spec.node not in self.nodes:
            if self.now - self.followed > ORPHAN_SECONDS:  # no table of its own for so long: it lets the stack go
                self.words, self.attached, self.kept = [0] * BUCKETS, {}, [0] * BUCKETS
            return
        self.followed = self.now
        spec = table.spec
        self.set_of |= {e.id: spec.set_of(e) for e in spec.engines}
        for engine in spec.engines:
            if engine.pod_uid in here:
                self.attached[engine.id] = engine.pod_uid
        foreign = self._foreign(spec)
        ready = set(self.attached) - self.stuck - foreign.keys()
        staying = any(e.state in ("Pending", "Starting", "Active") for e in spec.engines)
        settled, moved = True, 0
        for bucket, owner in enumerate(spec.owner_ids()):
            if owner.slot == self.words[bucket]:
                continue
            mute = self.words[bucket] in self.attached and self.words[bucket] not in ready  # it cannot hand over
            possible = not mute and (owner.slot in ready or (not owner.slot and not staying))
            if not possible or moved == batch:
                settled = False
                continue
            before = self.words[bucket]
            if before and owner.slot and self.set_of[before] != self.set_of[owner.slot]:
                assert self.set_of[owner.slot] == spec.current_set(), "buckets are switched to the current set alone"
                assert not self.kept[bucket], "never three sets"
                self.kept[bucket] = before
            elif self.kept[bucket]:
                assert before not in ready or not owner.slot or self._leaves(before), (
                    "what is mirrored stays where it is"
                )
            self.words[bucket] = owner.slot
            moved += 1
        self._keep(spec, ready)
        named = {e.id for e in spec.engines}
        serving = {i for i in self.attached if i not in self.stuck}
        kept = {i: u for i, u in self.attached.items() if i in named or (i in serving and i in self.words + self.kept)}
        self.lost |= set(self.attached) - set(kept)
        self.attached = kept
        counts = Counter(self.words)
        report = {
            "node": spec.node,
            "observedGeneration": self.get("FlowTable")["metadata"]["generation"],
            "settled": settled,
            "owned": BUCKETS - counts[0],
            "firewall": self.firewall,
            "engines": [
                {
                    "id": i,
                    "name": f"edge-{i}",
                    "ready": i in ready,
                    "buckets": counts[i],
                    "mac": self.macs.get(i, f"02:00:00:00:00:{i % 256:02x}"),
                    **({"configured": True} if spec.sets else {}),
                    **({"shard": foreign[i]} if i in foreign else {}),
                }
                for i in sorted(self.attached)
            ],
        }
        if spec.sets:
            kept = Counter(self.set_of[i] for i in self.kept if i)
            report["sets"] = [
                {
                    "id": s.id,
                    "keptBuckets": power_of_two_below(kept[s.id]),
                    "connections": power_of_two_below(kept[s.id]),
                    **({"silentSince": _time(self.silent_since)} if kept[s.id] else {}),
                }
                for s in spec.sets
            ]
        if self.get("FlowTable").get("status") != {"nodes": [report]}:
            self.change(("FlowTable", "edge"), lambda b: b.update(status={"nodes": [report]}))

    def _foreign(self, spec):
        """Engines that are not let in, since their build has another shard layout than the memory of their set."""
        memory = {s.id: s.shard or shards.FIRST for s in spec.sets or ()}
        images = {i: self.get("Pod", f"edge-{i}")["spec"]["containers"][0]["image"] for i in self.attached}
        has = {i: self.layouts.get(image, shards.FIRST) for i, image in images.items()}
        return {i: shard for i, shard in has.items() if shard != memory.get(self.set_of[i], shards.FIRST)}

    def _keep(self, spec, ready):
        """What becomes of connections of before, as the table says."""
        previous = spec.keeper_ids()
        named = {s.id for s in spec.sets or () if not s.ending}
        for bucket, keeper in enumerate(self.kept):
            if keeper and spec.sets and self.set_of[keeper] not in named:
                self.kept[bucket] = 0
            elif keeper and keeper not in self.attached and previous[bucket].slot in ready:
                assert self.set_of[previous[bucket].slot] == self.set_of[keeper]
                self.kept[bucket] = previous[bucket].slot

    def _leaves(self, number):
        pod = self.get("Pod", f"edge-{number}")
        return pod is None or observing.terminating(pod) or self.table_state(number) != "Active"

    def table_state(self, number):
        return next((e.state for e in self.table().spec.engines if e.id == number), None)

    def end_connections(self, share=1):
        """Of every `share`-th bucket, those that engines have kept end; of engines that are gone nothing ends."""
        for bucket in range(0, BUCKETS, share):
            if self.kept[bucket] in self.attached and self.kept[bucket] not in self.stuck:
                self.kept[bucket] = 0

    # ---- time

    def settle(self, rounds=400):
        """Everybody does its work until nobody has any."""
        quiet = 0
        for _ in range(rounds):
            before = self.version
            decision = self.operator()
            self.kubelet()
            self.agent()
            quiet = quiet + 1 if self.version == before and not decision.writes else 0
            if quiet > 3:
                return
            self.now += 70.0 if quiet else 1.0  # longer than any pause
        raise AssertionError(f"no rest: {[(w.verb, w.kind, w.name, w.body) for w in self.operator().writes]}")

    def check_goal(self):
        replicas = self.stack["spec"]["replicas"]
        table = self.table()
        assert len(table.spec.engines) == replicas
        assert len(self.of("Pod")) == len(self.of("PacketEngine")) == replicas
        assert {e.state for e in table.spec.engines} <= {"Active"}
        counts = Counter(self.words)
        if replicas:
            assert set(counts) == {e.id for e in table.spec.engines}
            assert max(counts.values()) - min(counts.values()) <= 1
        else:
            assert set(counts) == {0}
        status = self.status
        assert status["replicas"] == status["readyReplicas"] == status["updatedReplicas"] == replicas
        assert status["drainingReplicas"] == 0
        for pod in self.of("Pod"):
            assert pod["metadata"]["labels"]["packetstack.io/engine-state"] == "Active"
            ready = next(c for c in pod["status"]["conditions"] if c["type"] == "packetstack.io/DataPath")
            assert ready["status"] == "True"
        assert self.condition("Progressing")["status"] == "False"
        assert self.condition("CapacityAvailable")["status"] == "True"
        assert self.condition("Degraded")["status"] == "False"
        assert self.condition("Available")["status"] == str(bool(replicas))


def _joined(old, new):
    joined = dict(new)
    for part in ("labels", "annotations"):
        if part in new:
            joined[part] = {**old.get(part, {}), **new[part]}
    return joined


def _merged(old, new):
    """A status by server-side apply: conditions are a map by type."""
    merged = {**old, **new}
    if "conditions" in new:
        conditions = {c["type"]: c for c in old.get("conditions", ())} | {c["type"]: c for c in new["conditions"]}
        merged["conditions"] = list(conditions.values())
    return merged


def _time(now):
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _waits():
    return {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}


def _runs(now):
    state = {"running": {"startedAt": _time(now)}}
    return {"phase": "Running", "containerStatuses": [{"name": "engine", "state": state, "restartCount": 0}]}
