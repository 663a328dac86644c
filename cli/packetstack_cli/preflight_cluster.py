"""What a cluster needs for stacks, what of it is there, and what to do about the rest. Changes nothing."""

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from importlib.metadata import version
from typing import Protocol

from packetstack_cli.api import Api, CommandFailed
from packetstack_cli.checks import Check, kernel, version_of
from packetstack_cli.errors import CliError
from packetstack_core import crds
from packetstack_core.resources import API_VERSION
from packetstack_core.values import quantity
from packetstack_core.verbs import Json

OLDEST_KUBERNETES = (1, 31)
NETWORKS = "k8s.cni.cncf.io/v1"
ENFORCE = "pod-security.kubernetes.io/enforce"
COMPONENT = "app.kubernetes.io/name=packetstack,app.kubernetes.io/component="


class Examined(Protocol):
    """What is asked of a cluster."""

    @property
    def api(self) -> Api:
        """Its API server."""

    @property
    def namespace(self) -> str:
        """Where stacks shall run."""

    def ask_agent(self, pod: Json, *words: str) -> str:
        """What `packetstack WORDS` prints in the pod of an agent. CliError."""


def examine(cluster: Examined) -> list[Check]:
    """All findings about a cluster. CliError only if the API server cannot be reached."""
    cluster.api.get("/version")
    examined = _Cluster(cluster)
    parts = (
        examined.server, examined.kinds, examined.programs, examined.nodes, examined.namespaces, examined.needs
    )  # fmt: skip
    found = [check for part in parts for check in part()]
    return found + examined.hidden


class _Cluster:
    """Each method is a part of the examination; what they need twice is read once."""

    def __init__(self, cluster: Examined) -> None:
        self.cluster, self.api = cluster, cluster.api
        self.hidden: list[Check] = []
        """What we may not look at."""
        self.all_nodes = self._list("/api/v1/nodes", "nodes") or []
        self.stacks = self._list(f"/apis/{API_VERSION}/packetstacks", "PacketStacks") or []
        self.agents = self._pods("agent")

    def _list(self, path: str, what: str, **query: str) -> list[Json] | None:
        """Empty if there is no such kind, None if we may not look."""
        try:
            return list((self.api.find(path, **query) or {}).get("items") or ())
        except CliError as e:
            self.hidden.append(Check("unknown", "cluster", f"{what} cannot be listed: {e}"))
            return None

    def _pods(self, component: str) -> list[Json] | None:
        return self._list("/api/v1/pods", f"pods of the {component}", labelSelector=COMPONENT + component)

    def server(self) -> Iterator[Check]:
        text = str(self.api.get("/version").get("gitVersion"))
        oldest = ".".join(map(str, OLDEST_KUBERNETES))
        if version_of(text) >= OLDEST_KUBERNETES:
            yield Check("ok", "cluster", f"Kubernetes {text}")
        else:
            yield Check("missing", "cluster", f"Kubernetes {text}", f"use {oldest} or newer")

    def kinds(self) -> Iterator[Check]:
        for wanted in crds.definitions():
            name = wanted["metadata"]["name"]
            try:
                there = self.api.find(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
            except CliError as e:
                yield Check("unknown", "cluster", f"CRD {name} cannot be read: {e}")
                continue
            marks = (there or {}).get("metadata", {}).get("annotations") or {}
            conditions = {c["type"]: c["status"] for c in (there or {}).get("status", {}).get("conditions") or ()}
            if there is None:
                remedy = "helm install packetstack-crds charts/packetstack-crds"
                yield Check("missing", "cluster", f"no CRD {name}", remedy)
            elif conditions.get("Established") != "True":
                yield Check("missing", "cluster", f"CRD {name} is not established", f"kubectl describe crd {name}")
            elif marks.get(crds.SCHEMA_HASH) != wanted["metadata"]["annotations"][crds.SCHEMA_HASH]:
                remedy = "helm upgrade packetstack-crds, or use the packetstack command of its version"
                mine = f"this command is {version('packetstack')}"
                yield Check("warning", "cluster", f"CRD {name} is of another version; {mine}", remedy)
            else:
                yield Check("ok", "cluster", f"CRD {name}")

    def programs(self) -> Iterator[Check]:
        install = "helm install packetstack charts/packetstack --namespace packetstack-system"
        operators = self._pods("operator")
        if operators == []:
            yield Check("missing", "cluster", "no operator", install)
        for pod in operators or ():
            yield self._program("operator", pod)
        wanted = self._list("/apis/apps/v1/daemonsets", "DaemonSets", labelSelector=COMPONENT + "agent")
        if wanted == []:
            yield Check("missing", "cluster", "no agents", install)
        for agents in wanted or ():
            status = agents.get("status") or {}
            ready, desired = status.get("numberReady", 0), status.get("desiredNumberScheduled", 0)
            if not desired:
                yield Check(
                    "missing",
                    "cluster",
                    "agents run on no node",
                    "see the chart's agent.nodeSelector, agent.tolerations",
                )
            elif ready == desired:
                yield Check("ok", "cluster", f"agents are ready on {ready} of {desired} nodes")
            else:
                yield Check(
                    "warning", "cluster", f"agents are ready on {ready} of {desired} nodes", "see the nodes below"
                )

    def _program(self, what: str, pod: Json) -> Check:
        meta, said = pod["metadata"], _version_of(pod)
        where = f"-n {meta['namespace']} {meta['name']}"
        if not _ready(pod):
            return Check(
                "missing", "cluster", f"the {what} is not ready: {_waiting(pod)}", f"kubectl describe pod {where}"
            )
        if said not in ("", version("packetstack")):
            mine = f"this command {version('packetstack')}"
            return Check("warning", "cluster", f"the {what} is of version {said}, {mine}", "use the same")
        return Check("ok", "cluster", f"the {what} runs, version {said or 'unknown'}")

    # ---- nodes

    def nodes(self) -> Iterator[Check]:
        by_node = {p["spec"].get("nodeName"): p for p in self.agents or ()}
        for node in self.all_nodes:
            name = node["metadata"]["name"]
            where = f"node {name}"
            if node["status"].get("nodeInfo", {}).get("operatingSystem", "linux") != "linux":
                continue
            conditions = {c["type"]: c["status"] for c in node["status"].get("conditions") or ()}
            if conditions.get("Ready") != "True":
                yield Check("warning", where, "is not Ready", f"kubectl describe node {name}")
            pod = by_node.get(name)
            if pod is None and self.agents is not None:
                remedy = "see agent.nodeSelector and agent.tolerations of the chart if engines shall run here"
                info = node["status"].get("nodeInfo", {})
                yield kernel(where, str(info.get("kernelVersion")))
                yield Check(
                    "warning", where, "no agent: what it has is not known, and engines cannot serve here", remedy
                )
                continue
            if pod is not None:
                yield from self._ask(where, pod, str(node["status"].get("nodeInfo", {}).get("kernelVersion")))
            yield self._resources(where, node)

    def _ask(self, where: str, pod: Json, release: str) -> Iterator[Check]:
        """What the agent's pod sees of its node."""
        meta = pod["metadata"]
        if not _ready(pod):
            yield kernel(where, release)
            remedy = f"kubectl logs -n {meta['namespace']} {meta['name']}"
            yield Check("missing", where, f"the agent is not ready: {_waiting(pod)}", remedy)
            return
        try:
            said = self.cluster.ask_agent(pod, "preflight", "-o", "json")
        except CommandFailed as e:  # so it ends where something is missing
            said = e.output or str(e)
        except CliError as e:
            said = str(e)
        try:
            yield from (Check(**(c | {"where": where})) for c in json.loads(said))
        except (ValueError, TypeError):
            yield kernel(where, release)
            yield Check("unknown", where, f"its agent cannot be asked: {said}")

    def _resources(self, where: str, node: Json) -> Check:
        name, has = node["metadata"]["name"], node["status"].get("allocatable") or {}
        exclusive = [_place(s) for s in self.stacks if _engine(s).get("cpuPolicy") == "Exclusive"]
        pages = [f"{k.removeprefix('hugepages-')}: {v}" for k, v in has.items() if k.startswith("hugepages-")]
        given = f"{has.get('cpu')} CPUs, huge pages {', '.join(pages) or 'none'}"
        try:
            settings = self.api.get(f"/api/v1/nodes/{name}/proxy/configz")["kubeletconfig"]
        except (CliError, KeyError) as e:
            return Check("unknown", where, f"for pods: {given}; the kubelet's CPU manager cannot be asked: {e}")
        policy = settings.get("cpuManagerPolicy") or "none"
        message = f"for pods: {given}, CPU manager {policy}"
        if policy != "static" and exclusive:
            remedy = f"{exclusive[0]} wants exclusive cores: set cpuManagerPolicy: static and restart the kubelet"
            return Check("warning", where, message, remedy)
        return Check("ok", where, message)

    # ---- namespaces and stacks

    def namespaces(self) -> Iterator[Check]:
        whose = {s["metadata"]["namespace"]: "engines" for s in self.stacks} | {self.cluster.namespace: "engines"}
        whose |= {p["metadata"]["namespace"]: "agents" for p in self.agents or ()}
        for name, who in sorted(whose.items()):
            where = f"namespace {name}"
            try:
                there = self.api.find(f"/api/v1/namespaces/{name}")
            except CliError as e:
                yield Check("unknown", where, f"cannot be read: {e}")
                continue
            if there is None:
                yield Check("missing", where, "is not there", f"kubectl create namespace {name}")
                continue
            level = (there["metadata"].get("labels") or {}).get(ENFORCE)
            if level in (None, "privileged"):
                yield Check("ok", where, f"Pod Security lets {who} run ({level or 'no label'})")
            else:
                why = f"Pod Security is {level}, and {who} need a directory of their node"
                remedy = f"kubectl label namespace {name} {ENFORCE}=privileged --overwrite"
                yield Check("missing", where, why, remedy)

    def needs(self) -> Iterator[Check]:
        """Networks, devices, claims and huge pages that the stacks ask for."""
        for stack in self.stacks:
            yield from self._needs(stack)

    def _needs(self, stack: Json) -> Iterator[Check]:
        where, engine, namespace = f"stack {_place(stack)}", _engine(stack), stack["metadata"]["namespace"]
        interface = engine.get("interface") or {}
        device = interface.get("devicePlugin") or {}
        network = (interface.get("attachment") or device).get("networkAttachmentDefinition")
        if network:
            yield self._network(where, network if "/" in network else f"{namespace}/{network}")
        if device.get("resourceName"):
            yield self._allocatable(where, device["resourceName"], 1, "is its device plugin running?")
        claim = (interface.get("resourceClaim") or {}).get("resourceClaimTemplateName")
        if claim:
            yield self._claim(where, namespace, claim)
        pages = engine.get("hugePages")
        if pages:
            size = pages.get("pageSize") or "2Mi"
            remedy = "reserve them, and restart the kubelet"
            yield self._allocatable(where, f"hugepages-{size}", quantity(pages["size"]), remedy)

    def _network(self, where: str, network: str) -> Check:
        namespace, _, name = network.partition("/")
        try:
            if self.api.find(f"/apis/{NETWORKS}") is None:
                remedy = "install Multus and its CRD"
                return Check("missing", where, "the cluster has no NetworkAttachmentDefinitions", remedy)
            path = f"/apis/{NETWORKS}/namespaces/{namespace}/network-attachment-definitions/{name}"
            if self.api.find(path) is None:
                return Check(
                    "missing", where, f"no NetworkAttachmentDefinition {network}", "create it, or name another"
                )
        except CliError as e:
            return Check("unknown", where, f"NetworkAttachmentDefinition {network} cannot be read: {e}")
        return Check("ok", where, f"NetworkAttachmentDefinition {network}")

    def _claim(self, where: str, namespace: str, name: str) -> Check:
        try:
            if self.api.find("/apis/resource.k8s.io/v1") is None:
                return Check("missing", where, "the cluster has no resource.k8s.io/v1", "use Kubernetes 1.34 or newer")
            path = f"/apis/resource.k8s.io/v1/namespaces/{namespace}/resourceclaimtemplates/{name}"
            if self.api.find(path) is None:
                return Check("missing", where, f"no ResourceClaimTemplate {name}", "create it, or name another")
        except CliError as e:
            return Check("unknown", where, f"ResourceClaimTemplate {name} cannot be read: {e}")
        return Check("ok", where, f"ResourceClaimTemplate {name}")

    def _allocatable(self, where: str, resource: str, least: Decimal | int, remedy: str) -> Check:
        """Whether one node at least has enough for one engine."""
        has = {n["metadata"]["name"]: (n["status"].get("allocatable") or {}).get(resource) for n in self.all_nodes}
        enough = {name: text for name, text in has.items() if text is not None and quantity(text) >= least}
        if enough:
            return Check("ok", where, f"{resource} on {', '.join(f'{n} ({t})' for n, t in sorted(enough.items()))}")
        return Check("missing", where, f"no node has {resource} enough for an engine", remedy)


def _place(stack: Json) -> str:
    return f"{stack['metadata']['namespace']}/{stack['metadata']['name']}"


def _engine(stack: Json) -> Json:
    return stack["spec"].get("engine") or {}


def _version_of(pod: Json) -> str:
    return str((pod["metadata"].get("labels") or {}).get("app.kubernetes.io/version") or "")


def _ready(pod: Json) -> bool:
    conditions: Sequence[Json] = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _waiting(pod: Json) -> str:
    """Why a pod is not ready, as far as its status says."""
    for c in pod["status"].get("containerStatuses") or ():
        state = c.get("state") or {}
        why = state.get("waiting") or state.get("terminated")
        if why:
            return " ".join(f"{why.get('reason')} {why.get('message') or ''}".split())
    for c in pod["status"].get("conditions") or ():
        if c["status"] != "True" and c.get("message"):
            return str(c["message"])
    return str(pod["status"].get("phase"))
