"""What the CLI asks of a cluster: the calls of `Client`, with answers of the same shape.

Resources come from the API server: PacketStack, its FlowTable, one PacketEngine for each engine. Live numbers come from
the agent of the stack's node, by a `packetstack` command in its pod; there a stack is called `<namespace>.<name>`.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from packetstack_cli import preflight
from packetstack_cli.api import Api, Json, NotAnswered, Refused
from packetstack_cli.client import CliError
from packetstack_core.resources import API_VERSION, PacketStack
from packetstack_core.wording import counted

MANAGER = "packetstack"
SYSTEM_NAMESPACE = "packetstack-system"
"""Where agents are looked for by somebody who may not look everywhere."""
AGENTS = "app.kubernetes.io/name=packetstack,app.kubernetes.io/component=agent"
REMOVE_SECONDS = 90.0
"""The operator gives up on a node that does not answer after 30 s."""


class ClusterClient:
    """One namespace of a cluster. `namespace`: None is that of the context."""

    poll_seconds = 0.3

    def __init__(self, kubeconfig: Path | None, context: str | None, namespace: str | None) -> None:
        self._kubeconfig, self._context, self._namespace = kubeconfig, context, namespace

    @cached_property
    def api(self) -> Api:
        """Connected when it is first needed."""
        return Api(self._kubeconfig, self._context)

    def close(self) -> None:
        """End the connection, if there is one."""
        if "api" in self.__dict__:
            self.api.close()

    @cached_property
    def namespace(self) -> str:
        """That names without one are in."""
        return self._namespace or self.api.namespace

    def _place(self, name: str) -> tuple[str, str]:
        """Namespace and name of `name` or `namespace/name`."""
        namespace, _, short = name.rpartition("/")
        return namespace or self.namespace, short

    def _path(self, name: str, plural: str = "packetstacks") -> str:
        namespace, short = self._place(name)
        return f"/apis/{API_VERSION}/namespaces/{namespace}/{plural}/{short}"

    def call(self, verb: str, **arguments: Any) -> Any:
        """The answer to one verb, as `Client.call`."""
        match verb:
            case "get":
                return self._get(arguments.get("name"))
            case "scale":
                return self._scale(arguments["name"], arguments["replicas"])
            case "events":
                return self._events(arguments.get("name"))
            case "explain":
                return self._explain(**arguments)
            case "metrics":
                return self._metrics()
            case "move_queue":
                return self._move_queue(**arguments)
            case "move_buckets":
                raise CliError("buckets: the operator decides who owns them, in the FlowTable; use `scale` instead")
            case _:  # upgrade
                raise CliError(
                    f"{verb}: an engine's build is its pod's image. A chart or spec.engine.image with another image "
                    "replaces engines one by one; kubectl delete pod ENGINE replaces one. Flows are handed over"
                )

    # ---- what the API server knows ---------------------------------------------------------------------------

    def _stack(self, name: str) -> Json:
        try:
            return self.api.get(self._path(name))
        except Refused as e:
            if e.status != 404:
                raise
            self._must_know_kinds(e)
            namespace, short = self._place(name)
            known = ", ".join(s["metadata"]["name"] for s in self._stacks(namespace)) or "none"
            raise CliError(f"stack {short}: not found in namespace {namespace}; there are: {known}") from None

    def _stacks(self, namespace: str) -> list[Json]:
        try:
            return self.api.items(f"/apis/{API_VERSION}/namespaces/{namespace}/packetstacks")
        except Refused as e:
            self._must_know_kinds(e)
            raise

    def _must_know_kinds(self, refused: Refused) -> None:
        if refused.status == 404 and not refused.known:
            raise CliError(
                "the cluster does not know PacketStacks; install the charts packetstack-crds and packetstack"
            ) from None

    def _get(self, name: str | None) -> list[Json]:
        if name is not None:
            namespace, short = self._place(name)
            stacks, selector = [self._stack(name)], {"labelSelector": f"packetstack.io/stack={short}"}
            tables = [t for t in [self.api.find(self._path(name, "flowtables"))] if t is not None]
        else:
            namespace, selector = self.namespace, {}
            stacks = self._stacks(namespace)
            tables = self.api.items(f"/apis/{API_VERSION}/namespaces/{namespace}/flowtables")
        engines = self.api.items(f"/apis/{API_VERSION}/namespaces/{namespace}/packetengines", **selector)
        return [
            shown(
                stack,
                next((t for t in tables if _name(t) == _name(stack)), None),
                [e for e in engines if e["spec"]["stack"] == _name(stack)],
            )
            for stack in stacks
        ]

    def _scale(self, name: str, replicas: int) -> Json:
        was = int(self._stack(name)["spec"]["replicas"])
        query = {"fieldManager": MANAGER}
        body = {"spec": {"replicas": replicas}}
        self.api.request("PATCH", f"{self._path(name)}/scale", query, body, "merge-patch+json")
        return {"from": was, "to": replicas}

    def begin(self, metrics_listen: str | None) -> bool:
        """An agent of a cluster is started by its DaemonSet."""
        if metrics_listen:
            raise CliError("--metrics-listen: is for the agent of this host; agents of a cluster serve metrics anyway")
        return False

    def abandon(self) -> None:
        """`begin` starts nothing."""

    def apply(
        self, stacks: Sequence[PacketStack], uplinks: Sequence[str], force: bool, firewall: str | None = None
    ) -> list[dict[str, str]]:
        """As `Client.apply`, by server-side apply of what the user has written: defaults are not ours to own."""
        if uplinks:
            raise CliError(
                "--uplink: is for the agent of this host; in a cluster it is the chart's value agent.uplinks"
            )
        if firewall:
            raise CliError(
                "--firewall: is for the agent of this host; in a cluster it is the chart's value agent.firewall"
            )
        # All are tried before one is written.
        self.check(stacks, force)
        results = []
        for stack in stacks:
            namespace, path = self._target(stack)
            was = self.api.find(path)
            now = self._write(path, namespace, stack, force)
            old, new = ((o or {}).get("metadata", {}).get("generation") for o in (was, now))
            word = "created" if was is None else "unchanged" if old == new else "changed"
            name = stack.name if namespace == self.namespace else f"{namespace}/{stack.name}"
            results.append({"stack": name, "result": word})
        return results

    def check(self, stacks: Sequence[PacketStack], force: bool = False) -> None:
        """What the API server has against them. CliError."""
        for stack in stacks:
            namespace, path = self._target(stack)
            self._write(path, namespace, stack, force, dryRun="All")

    def _target(self, stack: PacketStack) -> tuple[str, str]:
        namespace = self.namespace
        if "namespace" in stack.metadata.model_fields_set:
            namespace = stack.metadata.namespace
            if self._namespace not in (None, namespace):
                raise CliError(
                    f"stack {stack.name}: metadata.namespace is {namespace}; use --namespace {namespace}, or leave one out"
                )
        return namespace, self._path(f"{namespace}/{stack.name}")

    def _write(self, path: str, namespace: str, stack: PacketStack, force: bool, **query: str) -> Json:
        body = stack.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
        body["metadata"]["namespace"] = namespace
        options = {"fieldManager": MANAGER, "force": str(force).lower(), **query}
        try:
            return self.api.request("PATCH", path, options, body, "apply-patch+yaml")
        except Refused as e:
            self._must_know_kinds(e)
            if e.status != 409:
                raise
            # `packetstack scale` is ours too: a file that says another number means it.
            others = [c for c in e.causes if not str(c.get("message")).startswith(f'conflict with "{MANAGER}"')]
            if not others and e.causes:
                return self._write(path, namespace, stack, True, **query)
            fields = ", ".join(f"{c.get('field')} ({c.get('message')})" for c in others) or str(e)
            raise CliError(
                f"stack {stack.name}: somebody else has set {fields}; leave it out of the file, or use --force-conflicts"
            ) from None

    def chosen(self, stacks: Sequence[str], name: str | None, everything: bool) -> list[str]:
        """Those that `down` shall end. Never a stack that nobody has named."""
        if name is not None:
            return [_name(self._stack(name)) if "/" not in name else name]
        if not everything:
            raise CliError(f"name a stack, or use --all for all of namespace {self.namespace}: {', '.join(stacks)}")
        return list(stacks)

    def remove(self, names: Sequence[str], last: bool) -> None:
        """Delete these stacks, and wait until their nodes have let them go."""
        del last  # agents stay
        uids = {name: self._stack(name)["metadata"]["uid"] for name in names}
        for name, uid in uids.items():
            self.api.request("DELETE", self._path(name), body={"preconditions": {"uid": uid}})
        deadline = time.monotonic() + REMOVE_SECONDS
        for name, uid in uids.items():
            while (left := self.api.find(self._path(name))) is not None and left["metadata"]["uid"] == uid:
                if time.monotonic() > deadline:
                    finalizers = ", ".join(left["metadata"].get("finalizers") or ()) or "none"
                    raise CliError(
                        f"stack {name}: is still there after {REMOVE_SECONDS:g} s, with finalizers: {finalizers}; "
                        "does the operator run? See packetstack preflight"
                    )
                time.sleep(self.poll_seconds)

    def log(self, engine: str | None) -> str:
        """Of an engine's pod; without one, of all agents."""
        if engine is not None:
            namespace, pod = self._place(engine)
            return self.api.text(f"/api/v1/namespaces/{namespace}/pods/{pod}/log", container="engine")
        pods = self._agents()
        texts = []
        for agent in pods:
            path = f"/api/v1/namespaces/{agent['metadata']['namespace']}/pods/{_name(agent)}/log"
            lines = self.api.text(path, container="agent").splitlines(keepends=True)
            texts += [f"{agent['spec']['nodeName']}: {line}" for line in lines] if len(pods) > 1 else lines
        return "".join(texts)

    def check_build(self) -> None:
        """An engine's build is its pod's image: agents compare it with their own."""

    def end_flows(self, name: str) -> dict[str, Any]:
        """Let the agent of the stack's node, which stands by since another build was there, end all flows and begin anew."""
        node, _ = self._node_of(name)
        said: Json = self._ask(node, "upgrade", "--agent", "--end-flows")
        return {"node": node} | said

    def restart_agent(self, end_flows: bool = False) -> bool:
        """Refused: it is the DaemonSet's."""
        if end_flows:
            raise CliError("--end-flows: name a stack instead of --agent; all stacks of its node begin anew")
        raise CliError(
            "agents: are restarted by their DaemonSet, and engines go on meanwhile; "
            f"use kubectl -n {SYSTEM_NAMESPACE} rollout restart daemonset/packetstack-agent"
        )

    def agent_pid(self) -> int:
        """Nobody has been restarted."""
        return 0

    # ---- what agents know ------------------------------------------------------------------------------------

    def _agents(self) -> list[Json]:
        """Pods of all agents that run."""
        try:
            pods = self.api.items("/api/v1/pods", labelSelector=AGENTS)
        except Refused as e:
            if e.status != 403:
                raise
            pods = self.api.items(f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods", labelSelector=AGENTS)
        return [p for p in pods if p["status"].get("phase") == "Running" and not p["metadata"].get("deletionTimestamp")]

    def ask_agent(self, pod: Mapping[str, Any], *words: str) -> str:
        """What `packetstack WORDS` prints in the pod of an agent. CliError."""
        meta = pod["metadata"]
        return self.api.execute(meta["namespace"], meta["name"], "agent", ["packetstack", *words])

    def _ask(self, node: str, *words: str) -> Any:
        """The same as data, of the agent of a node."""
        pod = next((p for p in self._agents() if p["spec"].get("nodeName") == node), None)
        if pod is None:
            raise NotAnswered(f"node {node or 'none'}: no agent runs there; see packetstack preflight")
        return json.loads(self.ask_agent(pod, *words, "-o", "json"))

    def live(self, name: str | None, must: bool = True) -> list[Json]:
        """As `get`, with numbers of this moment; without them, and a warning, unless they `must` be there."""
        items = self._get(name)
        for node in sorted({str(i["status"]["node"]) for i in items if i["status"]["node"]}):
            try:
                answers = {_agents_name(a): a["status"] for a in self._ask(node, "get")}
            except CliError as e:
                if must:
                    raise
                click.echo(f"without live numbers: {e}", err=True)
                continue
            for item in items:
                answer = answers.get(_agents_name(item))
                if answer is not None and item["status"]["node"] == node:
                    item["status"] |= merged(item["status"], answer)
        return items

    def _node_of(self, name: str) -> tuple[str, str]:
        """Where the stack's engines are, and what the agent there calls it."""
        stack = self._stack(name)
        node = str(stack.get("status", {}).get("node") or "")
        if not node:
            raise CliError(f"stack {name}: has no engine yet, so no node; see packetstack describe {name}")
        return node, _agents_name(stack)

    def _explain(self, name: str, protocol: str, source: str, sport: int, destination: str, dport: int) -> Json:
        node, known = self._node_of(name)
        flow = [protocol, _endpoint(source, sport), _endpoint(destination, dport)]
        result: Json = self._ask(node, "explain", known, *flow)
        if pod := result.get("owner", {}).get("pod"):
            result["owner"]["slot"] = _number(pod)
        return result | {"node": node}

    def _move_queue(self, name: str, slot: int, queue: int, core: int) -> Json:
        node, known = self._node_of(name)
        # The agent has numbers of its own; the pod's name is the same for both.
        engines = {e["name"]: e["slot"] for e in self._ask(node, "get", known)["status"]["engines"]}
        pod = f"{self._place(name)[1]}-{slot}"
        if pod not in engines:
            raise CliError(f"engine {slot}: not found; there are: {', '.join(sorted(engines)) or 'none'}")
        result: Json = self._ask(node, "move", known, "--queue", f"{engines[pod]}:{queue}", "--core", str(core))
        return result

    def _metrics(self) -> str:
        pods = self._agents()
        texts = [self.ask_agent(pod, "metrics") for pod in pods]
        if len(pods) == 1:
            return texts[0]
        return "".join(f"# node {p['spec']['nodeName']}\n{t}" for p, t in zip(pods, texts, strict=True))

    def _events(self, name: str | None) -> list[Json]:
        items = self._get(name)
        namespace = self._place(name)[0] if name else self.namespace
        names = [_name(i) for i in items]
        engine = re.compile(rf"({'|'.join(map(re.escape, names))})-\d{{1,4}}")
        found = []
        for kind in ("PacketStack", "Pod"):
            path = f"/api/v1/namespaces/{namespace}/events"
            for event in self.api.items(path, fieldSelector=f"involvedObject.kind={kind}"):
                about = str(event["involvedObject"].get("name"))
                # What happens to every pod that starts is no news.
                match = engine.fullmatch(about) if kind == "Pod" and event.get("type") == "Warning" else None
                if about in names if kind == "PacketStack" else match:
                    found.append(_event(event, match[1] if match else about, about if match else ""))
        for node in sorted({str(i["status"]["node"]) for i in items if i["status"]["node"]}):
            try:
                said = self._ask(node, "events")
            except CliError as e:
                click.echo(f"without the agent's events: {e}", err=True)
                continue
            for event in said:
                space, _, short = str(event["stack"]).partition(".")
                if space == namespace and short in names:
                    found.append(event | {"stack": short})
        return sorted(found, key=lambda e: e["time"])

    # ---- preflight -------------------------------------------------------------------------------------------

    def preflight(self) -> list[preflight.Check]:
        """What the cluster, its nodes and namespaces have and lack."""
        return preflight.cluster(self)


# ---- shapes --------------------------------------------------------------------------------------------------------


def shown(stack: Json, table: Json | None, engines: Sequence[Json]) -> Json:
    """A PacketStack as the verb `get` of an agent shows one. Numbers that only an agent knows are None."""
    spec, given = stack["spec"], stack.get("status") or {}
    conditions = {c["type"]: c for c in given.get("conditions") or ()}
    meta = {k: v for k, v in stack["metadata"].items() if k != "managedFields"}
    counts = {k: int(given.get(k) or 0) for k in ("replicas", "readyReplicas", "updatedReplicas", "drainingReplicas")}
    listed = [_engine(e) for e in sorted(engines, key=lambda e: int(e["spec"]["id"]))]
    settled = conditions.get("Progressing", {}).get("status") == "False"
    available = conditions.get("Available", {}).get("status") == "True" or not spec["replicas"]
    seen = int(given.get("observedGeneration") or 0) >= int(meta.get("generation") or 0)
    full = counts["readyReplicas"] == counts["updatedReplicas"] == spec["replicas"]
    capacity = {"pairs": 0, "flows": 0, "maxFlows": int(spec.get("flowTable", {}).get("maxFlows") or 0)}
    status = {
        **given,
        **counts,
        "node": given.get("node") or "",
        "conditions": list(conditions.values()),
        "flows": sum(e["flows"] for e in listed),
        "ready": seen and settled and available and full,
        "engines": listed,
        "drops": None,
        "backends": _backends(table),
        "capacity": capacity | dict(given.get("capacity") or {}),
        "rebalance": _rebalance(spec, given.get("rebalance") or {}),
        "flowTable": _table(table),
    }
    return {"apiVersion": API_VERSION, "kind": "PacketStack", "metadata": meta, "spec": spec, "status": status}


def _engine(engine: Json) -> Json:
    status = engine.get("status") or {}
    known = {k: status[k] for k in ("node", "message") if status.get(k)}
    return {
        "slot": int(engine["spec"]["id"]),
        "name": _name(engine),
        "state": status.get("state") or "Pending",
        "ready": bool(status.get("ready")),
        "buckets": int(status.get("buckets") or 0),
        "flows": int(status.get("flows") or 0),
        "pid": 0,
        "packetsPerSecond": None,
        "busy": None,
        "cores": [],
        **known,
    }


def _rebalance(spec: Json, given: Json) -> Json:
    """What the operator has moved; what cores and queues do, an agent knows."""
    moves = []
    if given.get("lastTime"):
        when = datetime.fromisoformat(str(given["lastTime"])).timestamp()
        moves.append(
            {"time": when, "what": counted(given.get("buckets", 0), "bucket"), "why": given.get("message", "")}
        )
    return {
        "mode": (spec.get("rebalance") or {}).get("mode", "Auto"),
        "maxOverMean": None,
        "bucketsMoved": None,
        "queuesMoved": None,
        "lastMoves": moves,
        "elephants": [{"bucket": b, "engine": None, "load": None} for b in given.get("elephants") or ()],
    }


def _backends(table: Json | None) -> list[Json]:
    listeners = table["spec"]["listeners"] if table is not None else ()
    ends = {(e["address"], e["port"]): e for li in listeners for e in li["backends"].get("endpoints") or ()}
    unknown = {"healthy": None, "flows": None, "flowsTotal": None}
    return [{"address": a, "port": p, "weight": e.get("weight", 1), **unknown} for (a, p), e in ends.items()]


def _table(table: Json | None) -> Json | None:
    """What the operator wants, and what the node's agent says of it."""
    if table is None:
        return None
    node = table["spec"].get("node")
    reports = (table.get("status") or {}).get("nodes") or ()
    report: Json = next((r for r in reports if r["node"] == node), {})
    kept = ("observedGeneration", "settled", "owned", "agentVersion", "message")
    return {"generation": table["metadata"]["generation"], **{k: report[k] for k in kept if k in report}}


def merged(status: Json, live: Json) -> Json:
    """What a node's agent knows better than the resources. Engines keep the operator's numbers."""
    by_name = {e["name"]: e for e in live["engines"]}
    engines = []
    for engine in status["engines"]:
        numbers = by_name.pop(engine["name"], {})
        engines.append({**engine, **numbers, "slot": engine["slot"], "state": engine["state"]})
    engines += [e | {"slot": _number(e["name"])} for e in by_name.values()]
    moves = sorted([*status["rebalance"]["lastMoves"], *live["rebalance"]["lastMoves"]], key=lambda m: float(m["time"]))
    rebalance = {**status["rebalance"], "queuesMoved": live["rebalance"]["queuesMoved"], "lastMoves": moves}
    known = {k: live[k] for k in ("flows", "drops", "backends", "handover")}
    return {"engines": engines, "rebalance": rebalance, "leaving": live.get("leaving", []), **known}


def _event(event: Json, stack: str, pod: str) -> Json:
    when = event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp")
    message = str(event.get("message") or "")
    return {
        "time": datetime.fromisoformat(when).timestamp() if when else 0.0,
        "type": str(event.get("type") or "Normal"),
        "stack": stack,
        "reason": str(event.get("reason") or ""),
        "message": f"pod {pod}: {message}" if pod else message,
    }


def _name(document: Mapping[str, Any]) -> str:
    return str(document["metadata"]["name"])


def _number(pod: str) -> int:
    """The operator's, of an engine."""
    return int(pod.rpartition("-")[2])


def _agents_name(stack: Mapping[str, Any]) -> str:
    """What an agent calls a stack."""
    return f"{stack['metadata']['namespace']}.{stack['metadata']['name']}"


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
