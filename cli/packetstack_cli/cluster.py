"""A cluster as commands see it.

Resources come from the API server: PacketStack, its FlowTable, one PacketEngine for each engine. Live numbers come from
the agent of the stack's node, by a `packetstack` command in its pod; there a stack is called `<namespace>.<name>`.
"""

import json
import re
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click

from packetstack_cli import preflight_cluster
from packetstack_cli.api import Api, NotAnswered, Refused
from packetstack_cli.backend import Live, Removal, Wishes
from packetstack_cli.checks import Check
from packetstack_cli.errors import CliError
from packetstack_cli.shapes import agents_name, endpoint, event_of, merged, name_of, number_of, shown
from packetstack_core import verbs
from packetstack_core.resources import API_VERSION, PacketStack
from packetstack_core.verbs import Json

MANAGER = "packetstack"
SYSTEM_NAMESPACE = "packetstack-system"
"""Where agents are looked for by somebody who may not look everywhere."""
AGENTS = "app.kubernetes.io/name=packetstack,app.kubernetes.io/component=agent"
POLL_SECONDS = 0.3
REMOVE_SECONDS = 90.0
"""The operator gives up on a node that does not answer after 30 s."""


class ClusterClient:
    """A `Backend`. One namespace of a cluster. `namespace`: None is that of the context."""

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
        """Namespace of the stacks that are named without one."""
        return self._namespace or self.api.namespace

    def _place(self, name: str) -> tuple[str, str]:
        """Namespace and name of `name` or `namespace/name`."""
        namespace, _, short = name.rpartition("/")
        return namespace or self.namespace, short

    def _path(self, name: str, plural: str = "packetstacks") -> str:
        namespace, short = self._place(name)
        return f"/apis/{API_VERSION}/namespaces/{namespace}/{plural}/{short}"

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

    def get(self, name: str | None = None) -> list[Json]:
        """One stack, or all of the namespace. Numbers that only an agent knows are None."""
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
                next((t for t in tables if name_of(t) == name_of(stack)), None),
                [e for e in engines if e["spec"]["stack"] == name_of(stack)],
            )
            for stack in stacks
        ]

    def scale(self, name: str, replicas: int) -> Json:
        """Set the number of engines by the scale subresource; the operator makes it so."""
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

    def apply(self, stacks: Sequence[PacketStack], wishes: Wishes) -> list[Json]:
        """By server-side apply of what the user has written: defaults are not ours to own."""
        for option, value in (("uplinks", wishes.uplinks), ("firewall", wishes.firewall)):
            if value:
                raise CliError(
                    f"--{option.removesuffix('s')}: is for the agent of this host; "
                    f"in a cluster it is the chart's value agent.{option}"
                )
        force = wishes.force_conflicts
        # All are tried before one is written.
        self._try(stacks, force)
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

    def check(self, stacks: Sequence[PacketStack]) -> None:
        """What the API server has against them. CliError."""
        self._try(stacks, force=False)

    def _try(self, stacks: Sequence[PacketStack], force: bool) -> None:
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

    def wait(self, names: Sequence[str], seconds: float) -> list[Json]:
        """The API server is asked again and again."""
        deadline = time.monotonic() + seconds
        while True:
            waiting = [s for name in names for s in self.get(name) if not s["status"]["ready"]]
            if not waiting or time.monotonic() > deadline:
                return waiting
            time.sleep(POLL_SECONDS)

    def removal(self, name: str | None, everything: bool) -> Removal:
        """Ends stacks that somebody has named, by name or with --all. Agents stay."""
        if name is None and not everything:
            there = ", ".join(name_of(s) for s in self.get())
            raise CliError(f"name a stack, or use --all for all of namespace {self.namespace}: {there}")
        stacks = self.get(name)
        names = [name] if name else [name_of(s) for s in stacks]
        flows = sum(s["status"]["flows"] for s in stacks)
        return Removal(f"{flows:,} live flows will end" if flows else "", partial(self._remove, names))

    def _remove(self, names: Sequence[str]) -> list[str]:
        """Delete these stacks, and wait until their nodes have let them go."""
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
                time.sleep(POLL_SECONDS)
        return [f"stack {name}: removed" for name in names]

    def log(self, engine: str | None) -> str:
        """What an engine's pod has written; without an engine, what all agents have."""
        if engine is not None:
            namespace, pod = self._place(engine)
            return self.api.text(f"/api/v1/namespaces/{namespace}/pods/{pod}/log", container="engine")
        pods = self._agents()
        texts = []
        for agent in pods:
            path = f"/api/v1/namespaces/{agent['metadata']['namespace']}/pods/{name_of(agent)}/log"
            lines = self.api.text(path, container="agent").splitlines(keepends=True)
            texts += [f"{agent['spec']['nodeName']}: {line}" for line in lines] if len(pods) > 1 else lines
        return "".join(texts)

    def upgrade(self, name: str) -> Json:
        """Refused: an engine's build is its pod's image."""
        raise CliError(
            f"{name}: an engine's build is its pod's image. A chart or spec.engine.image with another image replaces "
            "engines one by one; kubectl delete pod ENGINE replaces one. Flows are handed over"
        )

    def end_flows(self, name: str) -> dict[str, Any]:
        """Let the agent of the stack's node, which stands by since another build was there, end all flows and begin anew."""
        node, _ = self._node_of(name)
        said: Json = self._ask(node, "upgrade", "--agent", "--end-flows")
        return {"node": node} | said

    def restart_agent(self, end_flows: bool) -> int:
        """Refused: it is the DaemonSet's."""
        if end_flows:
            raise CliError("--end-flows: name a stack instead of --agent; all stacks of its node begin anew")
        raise CliError(
            "agents: are restarted by their DaemonSet, and engines go on meanwhile; "
            f"use kubectl -n {SYSTEM_NAMESPACE} rollout restart daemonset/packetstack-agent"
        )

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

    def ask_agent(self, pod: Json, *words: str) -> str:
        """What `packetstack WORDS` prints in the pod of an agent. CliError."""
        meta = pod["metadata"]
        return self.api.execute(meta["namespace"], meta["name"], "agent", ["packetstack", *words])

    def _ask(self, node: str, *words: str) -> Any:
        """The answer of a node's agent to `packetstack WORDS`, as data. CliError."""
        pod = next((p for p in self._agents() if p["spec"].get("nodeName") == node), None)
        if pod is None:
            raise NotAnswered(f"node {node or 'none'}: no agent runs there; see packetstack preflight")
        return json.loads(self.ask_agent(pod, *words, "-o", "json"))

    def live(self, name: str | None) -> Live:
        """Agents are asked for the numbers of this moment."""
        items, without = self.get(name), []
        for node in sorted({str(i["status"]["node"]) for i in items if i["status"]["node"]}):
            try:
                answers = {agents_name(a): a["status"] for a in self._ask(node, "get")}
            except CliError as e:
                without.append(str(e))
                continue
            for item in items:
                answer = answers.get(agents_name(item))
                if answer is not None and item["status"]["node"] == node:
                    item["status"] |= merged(item["status"], answer)
        return Live(items, without)

    def _node_of(self, name: str) -> tuple[str, str]:
        """Where the stack's engines are, and what the agent there calls it."""
        stack = self._stack(name)
        node = str(stack.get("status", {}).get("node") or "")
        if not node:
            raise CliError(f"stack {name}: has no engine yet, so no node; see packetstack describe {name}")
        return node, agents_name(stack)

    def explain(self, question: verbs.Explain) -> Json:
        """The agent of the stack's node knows."""
        node, known = self._node_of(question.name)
        ends = endpoint(question.source, question.sport), endpoint(question.destination, question.dport)
        result: Json = self._ask(node, "explain", known, question.protocol, *ends)
        for engine in (result.get("owner"), result.get("keeper")):
            if engine and "pod" in engine:
                engine["slot"] = number_of(engine["pod"])
        return result | {"node": node}

    def move_buckets(self, name: str, buckets: Sequence[int], slot: int, queue: int | None) -> Json:
        """Refused."""
        raise CliError("buckets: the operator decides who owns them, in the FlowTable; use `scale` instead")

    def move_queue(self, name: str, slot: int, queue: int, core: int) -> Json:
        """The agent of the stack's node does it."""
        node, known = self._node_of(name)
        # The agent has numbers of its own; the pod's name is the same for both.
        engines = {e["name"]: e["slot"] for e in self._ask(node, "get", known)["status"]["engines"]}
        pod = f"{self._place(name)[1]}-{slot}"
        if pod not in engines:
            raise CliError(f"engine {slot}: not found; there are: {', '.join(sorted(engines)) or 'none'}")
        result: Json = self._ask(node, "move", known, "--queue", f"{engines[pod]}:{queue}", "--core", str(core))
        return result

    def metrics(self) -> str:
        """Metrics of all agents, each under a comment that names its node."""
        pods = self._agents()
        texts = [self.ask_agent(pod, "metrics") for pod in pods]
        if len(pods) == 1:
            return texts[0]
        return "".join(f"# node {p['spec']['nodeName']}\n{t}" for p, t in zip(pods, texts, strict=True))

    def events(self, name: str | None) -> list[Json]:
        """Those of the API server, and those that agents remember."""
        items = self.get(name)
        namespace = self._place(name)[0] if name else self.namespace
        names = [name_of(i) for i in items]
        engine = re.compile(rf"({'|'.join(map(re.escape, names))})-\d{{1,4}}")
        found = []
        for kind in ("PacketStack", "Pod"):
            path = f"/api/v1/namespaces/{namespace}/events"
            for event in self.api.items(path, fieldSelector=f"involvedObject.kind={kind}"):
                about = str(event["involvedObject"].get("name"))
                # What happens to every pod that starts is no news.
                match = engine.fullmatch(about) if kind == "Pod" and event.get("type") == "Warning" else None
                if about in names if kind == "PacketStack" else match:
                    found.append(event_of(event, match[1] if match else about, about if match else ""))
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

    def preflight(self) -> list[Check]:
        """What the cluster, its nodes and namespaces have and lack."""
        return preflight_cluster.examine(self)
