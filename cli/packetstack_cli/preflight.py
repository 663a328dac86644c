"""What a host or a cluster needs for stacks, what of it is there, and what to do about the rest. Changes nothing."""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packetstack_cli.api import CommandFailed
from packetstack_cli.client import CliError
from packetstack_core import crds
from packetstack_core.resources import API_VERSION
from packetstack_core.values import quantity

if TYPE_CHECKING:
    from packetstack_cli.cluster import ClusterClient

OLDEST_KERNEL = (6, 1)
OLDEST_KUBERNETES = (1, 31)
NETWORKS = "k8s.cni.cncf.io/v1"
ENFORCE = "pod-security.kubernetes.io/enforce"
COMPONENT = "app.kubernetes.io/name=packetstack,app.kubernetes.io/component="

Result = Literal["ok", "warning", "missing", "unknown"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One finding. `missing`: stacks cannot run. `warning`: some cannot, or not as well. `unknown`: we may not look."""

    result: Result
    where: str
    """"cluster", "node NAME", "namespace NAME", "stack NAMESPACE/NAME" or "host"."""
    message: str
    remedy: str = ""

    def document(self) -> dict[str, str]:
        """As data."""
        return asdict(self)


# ---- one host ------------------------------------------------------------------------------------------------------


def host(firewall: Sequence[Mapping[str, Any]] = (), root: Path = Path("/")) -> list[Check]:
    """This one. `firewall`: what was found in its packet filter; `root`: where its /proc and /sys are."""
    return [*_host(root), *(Check(f["result"], "host", f["message"], f["remedy"]) for f in firewall)]


def _host(root: Path) -> Iterator[Check]:
    def check(good: bool, message: str, lacking: str, remedy: str, otherwise: Result = "missing") -> Check:
        return Check("ok", "host", message) if good else Check(otherwise, "host", lacking, remedy)

    if os.geteuid() != 0:
        yield Check("missing", "host", "you are not root", "an agent loads BPF programs: run packetstack as root")
    release = platform.release()
    oldest = ".".join(map(str, OLDEST_KERNEL))
    yield check(_numbers(release) >= OLDEST_KERNEL, f"kernel {release}", f"kernel {release}", f"use {oldest} or newer")
    yield check(
        _text(root / "sys/kernel/realtime") != "1",
        "the kernel is not PREEMPT_RT", "the kernel is PREEMPT_RT (/sys/kernel/realtime is 1)",
        "use one that is not: a handover counts on packets being handled without interruption on a CPU",
    )  # fmt: skip
    yield check(
        (root / "sys/kernel/btf/vmlinux").exists(),
        "the kernel describes its types (BTF)", "no /sys/kernel/btf/vmlinux", "use a kernel with CONFIG_DEBUG_INFO_BTF",
    )  # fmt: skip
    mounts = [line.split() for line in _text(root / "proc/mounts").splitlines()]
    yield check(
        any(len(m) > 2 and m[1] == "/sys/fs/bpf" and m[2] == "bpf" for m in mounts),
        "BPF file system at /sys/fs/bpf", "no BPF file system at /sys/fs/bpf",
        "mount -t bpf bpf /sys/fs/bpf (needed in a cluster)", "warning",
    )  # fmt: skip
    forward = "net.ipv4.ip_forward"
    yield check(
        _text(root / "proc/sys/net/ipv4/ip_forward") == "1", f"{forward}=1", f"{forward}=0", f"sysctl -w {forward}=1"
    )
    forward = "net.ipv6.conf.all.forwarding"
    yield check(
        _text(root / "proc/sys/net/ipv6/conf/all/forwarding") == "1", f"{forward}=1", f"{forward} is not 1",
        f"sysctl -w {forward}=1 for stacks with IPv6 addresses", "warning",
    )  # fmt: skip
    yield Check("ok", "host", f"{os.cpu_count()} CPUs, huge pages: {_huge_pages(root)}")
    for card in sorted((root / "sys/class/net").glob("*/device/sriov_totalvfs")):
        name, made = card.parts[-3], _text(card.with_name("sriov_numvfs"))
        free = len(list(card.parent.glob("virtfn*/net/*")))
        remedy = "" if made != "0" else f"for engines with VFs: echo N > /sys/class/net/{name}/device/sriov_numvfs"
        yield Check("ok", "host", f"{name}: {made} of {_text(card)} VFs, {free} of them are nobody's", remedy)


def _huge_pages(root: Path) -> str:
    sizes = []
    for directory in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        total = int(_text(directory / "nr_hugepages") or 0)
        if total:
            size = int(directory.name.removeprefix("hugepages-").removesuffix("kB")) // 1024
            sizes.append(f"{total} of {size} MiB ({_text(directory / 'free_hugepages')} free)")
    return ", ".join(sizes) or "none"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(text: str) -> tuple[int, int]:
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# ---- a cluster -----------------------------------------------------------------------------------------------------


def cluster(client: "ClusterClient") -> list[Check]:
    """All of it. CliError only if the API server cannot be reached."""
    client.api.get("/version")
    examined = _Cluster(client)
    parts = (
        examined.server, examined.kinds, examined.programs, examined.nodes, examined.namespaces, examined.needs
    )  # fmt: skip
    found = [check for part in parts for check in part()]
    return found + examined.hidden


class _Cluster:
    """Each method is a part of the examination; what they need twice is read once."""

    def __init__(self, client: "ClusterClient") -> None:
        self.client, self.api = client, client.api
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
        if _numbers(text) >= OLDEST_KUBERNETES:
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
                yield self._kernel(where, str(info.get("kernelVersion")))
                yield Check(
                    "warning", where, "no agent: what it has is not known, and engines cannot serve here", remedy
                )
                continue
            if pod is not None:
                yield from self._ask(where, pod, str(node["status"].get("nodeInfo", {}).get("kernelVersion")))
            yield self._resources(where, node)

    def _kernel(self, where: str, release: str) -> Check:
        if _numbers(release) >= OLDEST_KERNEL:
            return Check("ok", where, f"kernel {release}")
        return Check("missing", where, f"kernel {release}", f"use {'.'.join(map(str, OLDEST_KERNEL))} or newer")

    def _ask(self, where: str, pod: Json, kernel: str) -> Iterator[Check]:
        """What the agent's pod sees of its node."""
        meta = pod["metadata"]
        if not _ready(pod):
            yield self._kernel(where, kernel)
            remedy = f"kubectl logs -n {meta['namespace']} {meta['name']}"
            yield Check("missing", where, f"the agent is not ready: {_waiting(pod)}", remedy)
            return
        try:
            said = self.client.ask_agent(pod, "preflight", "-o", "json")
        except CommandFailed as e:  # so it ends where something is missing
            said = e.output or str(e)
        except CliError as e:
            said = str(e)
        try:
            yield from (Check(**(c | {"where": where})) for c in json.loads(said))
        except (ValueError, TypeError):
            yield self._kernel(where, kernel)
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
        whose = {s["metadata"]["namespace"]: "engines" for s in self.stacks} | {self.client.namespace: "engines"}
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
        """Of each stack: networks, devices, claims, huge pages."""
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

    def _allocatable(self, where: str, resource: str, least: Any, remedy: str) -> Check:
        """Whether one node at least has enough for one engine."""
        has = {n["metadata"]["name"]: (n["status"].get("allocatable") or {}).get(resource) for n in self.all_nodes}
        enough = {name: text for name, text in has.items() if text is not None and quantity(text) >= least}
        if enough:
            return Check("ok", where, f"{resource} on {', '.join(f'{n} ({t})' for n, t in sorted(enough.items()))}")
        return Check("missing", where, f"no node has {resource} enough for an engine", remedy)


def _place(stack: Mapping[str, Any]) -> str:
    return f"{stack['metadata']['namespace']}/{stack['metadata']['name']}"


def _engine(stack: Mapping[str, Any]) -> Json:
    return stack["spec"].get("engine") or {}


def _version_of(pod: Mapping[str, Any]) -> str:
    return str((pod["metadata"].get("labels") or {}).get("app.kubernetes.io/version") or "")


def _ready(pod: Mapping[str, Any]) -> bool:
    conditions: Sequence[Json] = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _waiting(pod: Mapping[str, Any]) -> str:
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
