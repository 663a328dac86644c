"""The commands against an API server without nodes: what they write, what they show, how they refuse.

Nobody serves the stacks here; `serve` writes what an operator would. Live numbers are in tests/kubernetes.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.cluster.control_plane import ControlPlane

from packetstack_cli import cluster, preflight_cluster
from packetstack_cli.main import main
from packetstack_cli.target import Target
from packetstack_core import crds

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
EDGE = """
apiVersion: packetstack.io/v1alpha1
kind: PacketStack
metadata:
  name: edge
spec:
  replicas: 2
  listeners:
  - {name: web, address: 192.0.2.10, port: 80, backends: {endpoints: [{address: 10.1.0.5, port: 8080}]}}
  snat: {addresses: [198.51.100.0/30]}
"""


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> ControlPlane:
    """With the kinds."""
    control_plane.define(*crds.definitions())
    return control_plane


def why(result: Result) -> str:
    """The one line with which a command has ended."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    text = str(result.exception.code)
    assert "\n" not in text
    return text


class Space:
    """A namespace, and the commands in it."""

    def __init__(self, server: ControlPlane, name: str, directory: Path) -> None:
        self.server, self.name, self.directory = server, name, directory

    def run(self, *words: str, kubeconfig: Path | None = None, text: str | None = None) -> Result:
        """`kubectl packetstack WORDS -n NAMESPACE`."""
        target = Target(cluster=True, kubeconfig=kubeconfig or self.server.kubeconfig, namespace=self.name)
        return CliRunner().invoke(main, words, obj=target, input=text, prog_name="kubectl packetstack")

    def said(self, *words: str, **more: Any) -> str:
        """What it printed."""
        result = self.run(*words, **more)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def refused(self, *words: str, **more: Any) -> str:
        """The one line that says why not."""
        return why(self.run(*words, **more))

    def file(self, text: str = EDGE) -> str:
        """A file with it."""
        path = self.directory / "stack.yaml"
        path.write_text(text)
        return str(path)

    def up(self, text: str = EDGE, *words: str) -> Result:
        """`up`, which nobody answers in time."""
        return self.run("up", self.file(text), "--timeout", "0", *words)

    def stack(self, name: str = "edge") -> Json:
        """As the server has it."""
        found: Json = self.server.get("packetstack", name, "-n", self.name, "--show-managed-fields")
        return found

    def serve(self, replicas: int, name: str = "edge", **more: Any) -> None:
        """What the operator would write when this many engines serve."""
        generation = self.stack(name)["metadata"]["generation"]
        since = {"lastTransitionTime": "2026-01-01T00:00:00Z", "message": "", "reason": "Played"}
        conditions = [{"type": t, "status": s, **since} for t, s in (("Available", "True"), ("Progressing", "False"))]
        counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas"), replicas)
        status = {"observedGeneration": generation, "conditions": conditions, **counts, **more}
        self.patch_status("packetstack", name, status)

    def patch_status(self, kind: str, name: str, status: Json) -> None:
        """As an operator or agent would."""
        self.server.api.merge(f"{self.server.api.path(kind, self.name, name)}/status", {"status": status})


@pytest.fixture
def space(server: ControlPlane, tmp_path: Path) -> Iterator[Space]:
    """A namespace of the test's own."""
    name = f"cli-{secrets.token_hex(4)}"
    server.create_namespace(name)
    yield Space(server, name, tmp_path)
    server.delete_namespace(name)


def owners(stack: Json, field: str) -> set[str]:
    """Who has set this field of the spec."""
    entries = stack["metadata"].get("managedFields", [])
    return {e["manager"] for e in entries if f"f:{field}" in e.get("fieldsV1", {}).get("f:spec", {})}


def engine(space: Space, stack: Json, number: int) -> Json:
    """A PacketEngine of a stack, as an operator would write it."""
    owner = {k: stack[k] for k in ("apiVersion", "kind")} | {k: stack["metadata"][k] for k in ("name", "uid")}
    name = stack["metadata"]["name"]
    meta = {"namespace": space.name, "ownerReferences": [owner], "labels": {"packetstack.io/stack": name}}
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketEngine",
        "metadata": {**meta, "name": f"{name}-{number}"},
        "spec": {"stack": name, "id": number},
    }


def test_up_writes_what_the_file_says_and_owns_nothing_else(space: Space) -> None:
    result = space.up()
    assert "stack edge: created" in result.stdout
    stack = space.stack()
    assert stack["spec"]["flowTable"]["buckets"] == 4096, "a default of the server"
    assert owners(stack, "replicas") == owners(stack, "listeners") == {"packetstack"}
    assert owners(stack, "flowTable") == owners(stack, "engine") == set()


def test_up_waits_for_engines_and_says_what_is_in_the_way(space: Space) -> None:
    text = why(space.up())
    assert text == "stack edge: 0 of 2 engines are ready after 0 s; see packetstack describe"
    since = {"lastTransitionTime": "2026-01-01T00:00:00Z", "status": "False"}
    shortage = {"type": "CapacityAvailable", "reason": "NoFreeVF", "message": "pod edge-1: no VF", **since}
    space.patch_status("packetstack", "edge", {"conditions": [shortage]})
    assert why(space.up()).endswith("; pod edge-1: no VF")
    space.serve(2)
    result = space.up()
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["stack edge: unchanged", "stack edge: 2 engines ready"]


def test_a_stack_is_not_ready_before_the_operator_has_seen_its_last_change(space: Space) -> None:
    space.up()
    space.serve(2)
    assert "changed" in space.up(EDGE.replace("port: 80,", "port: 81,")).stdout
    assert "are ready after 0 s" in space.up(EDGE.replace("port: 80,", "port: 81,")).output


def test_the_file_wins_over_our_own_scale_but_not_over_another_writer(space: Space) -> None:
    space.up()
    assert space.said("scale", "edge", "--replicas", "5", "--no-wait") == "stack edge: from 2 to 5 engines\n"
    assert "changed" in space.up().stdout
    assert space.stack()["spec"]["replicas"] == 2

    space.server.kubectl("scale", "packetstack", "edge", "-n", space.name, "--replicas=7")
    text = why(space.up())
    assert text.startswith('stack edge: somebody else has set .spec.replicas (conflict with "kubectl"')
    assert space.stack()["spec"]["replicas"] == 7

    without = EDGE.replace("  replicas: 2\n", "")
    space.up(without)
    assert space.stack()["spec"]["replicas"] == 7, "who leaves it out leaves it to others"
    space.up(EDGE, "--force-conflicts")
    assert space.stack()["spec"]["replicas"] == 2


def test_replicas_that_nobody_has_set_are_nobodys(space: Space) -> None:
    without = EDGE.replace("  replicas: 2\n", "")
    space.up(without)
    assert space.stack()["spec"]["replicas"] == 1
    space.server.kubectl("scale", "packetstack", "edge", "-n", space.name, "--replicas=4")
    space.up(without)
    assert space.stack()["spec"]["replicas"] == 4
    assert owners(space.stack(), "replicas") == set(), "scaling a default makes no owner"
    assert "changed" in space.up().stdout, "so a file takes it without a conflict"
    assert space.stack()["spec"]["replicas"] == 2
    space.server.kubectl("replace", "-n", space.name, "-f", "-", stdin=without)
    assert space.stack()["spec"]["replicas"] == 1, "a full update without it sets the default"


def test_of_several_stacks_none_is_written_if_one_is_refused(space: Space) -> None:
    space.up()
    new = EDGE.replace("name: edge", "name: new").replace("198.51.100.0/30", "198.51.100.4/30")
    text = why(space.up(f"{new}---\n{EDGE}  engine: {{mode: DPDK}}\n"))
    assert "spec.engine.mode" in text
    assert [s["metadata"]["name"] for s in json.loads(space.said("get", "-o", "json"))] == ["edge"]


def test_check_lets_the_server_read_too_and_changes_nothing(space: Space) -> None:
    assert "name: edge" in space.said("check", space.file())
    assert space.said("get", "-o", "json").strip() == "[]"
    few = space.server.kubeconfig_for(f"nobody-{space.name}")
    assert "forbidden" in space.refused("check", space.file(), kubeconfig=few)


def test_get_shows_what_the_resources_say_in_the_shape_of_an_agents_answer(space: Space) -> None:
    space.up()
    space.serve(2, node="node0", capacity={"pairs": 4, "flows": 245760, "maxFlows": 1000000})
    stack = space.stack()
    owner = {k: stack[k] for k in ("apiVersion", "kind")} | {k: stack["metadata"][k] for k in ("name", "uid")}
    meta = {"name": "edge", "namespace": space.name, "ownerReferences": [owner]}
    table = {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "FlowTable",
        "metadata": meta,
        "spec": {"node": "node0", "engines": [], **{k: stack["spec"][k] for k in ("listeners", "snat")}},
    }
    space.server.apply(table)
    for number in (1, 2):
        space.server.apply(engine(space, stack, number))
        space.patch_status("packetengine", f"edge-{number}", {"state": "Active", "ready": True, "buckets": 2048})
    found = json.loads(space.said("get", "edge", "-o", "json"))
    assert found["status"]["ready"] is True
    assert [(e["slot"], e["name"], e["buckets"]) for e in found["status"]["engines"]] == [
        (1, "edge-1", 2048),
        (2, "edge-2", 2048),
    ]
    assert found["status"]["backends"] == [
        {"address": "10.1.0.5", "port": 8080, "weight": 1, "healthy": None, "flows": None, "flowsTotal": None}
    ]
    assert "managedFields" not in found["metadata"]
    assert space.said("get").split()[6:] == ["edge", "2/2", "0", "0", "1", "192.0.2.10"]

    # No agent runs here.
    result = space.run("describe", "edge")
    assert result.exit_code == 0
    assert result.stderr.startswith("without live numbers: node node0: no agent runs there; see packetstack preflight")
    for words in ("2 ready of 2 wanted", "245,760 flows", "node0, its flow table not settled", "is not known"):
        assert words in result.stdout
    assert space.refused("top").startswith("node node0: no agent runs there")
    assert space.refused("explain", "edge", "tcp", "10.0.0.1:1", "192.0.2.10:80").startswith("node node0: no agent")


def test_events_are_those_of_the_stack_and_warnings_of_its_pods(space: Space) -> None:
    space.up()

    def event(kind: str, name: str, reason: str, level: str, minute: int) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": reason.lower(), "namespace": space.name},
            "involvedObject": {"kind": kind, "name": name, "namespace": space.name},
            "type": level,
            "reason": reason,
            "message": "said",
            "lastTimestamp": f"2026-01-01T00:{minute:02}:00Z",
        }

    space.server.apply(
        event("Pod", "edge-3", "Unhealthy", "Warning", 2),
        event("PacketStack", "edge", "EngineCreated", "Normal", 1),
        event("Pod", "edge-3", "Pulled", "Normal", 1),
        event("Pod", "edge-proxy-3", "Other", "Warning", 1),
        event("PacketStack", "other", "NotOurs", "Warning", 1),
    )
    shown = json.loads(space.said("events", "edge", "-o", "json"))
    assert [(e["reason"], e["stack"], e["message"]) for e in shown] == [
        ("EngineCreated", "edge", "said"),
        ("Unhealthy", "edge", "pod edge-3: said"),
    ]


def test_down_waits_until_the_stack_is_gone(space: Space) -> None:
    space.up()
    assert space.refused("down") == f"name a stack, or use --all for all of namespace {space.name}: edge"
    assert space.said("down", "edge") == "stack edge: removed\n"
    assert space.said("get", "-o", "json").strip() == "[]"
    space.up()
    assert space.said("down", "--all", "--yes") == "stack edge: removed\n"


def test_down_of_a_stack_of_another_namespace_says_that_its_flows_will_end(space: Space) -> None:
    space.up()
    space.server.apply(engine(space, space.stack(), 1))
    space.patch_status("packetengine", "edge-1", {"state": "Active", "ready": True, "flows": 128})
    elsewhere = Target(cluster=True, kubeconfig=space.server.kubeconfig, namespace="default")
    result = CliRunner().invoke(main, ["down", f"{space.name}/edge"], obj=elsewhere)
    assert result.exit_code == 0, result.output
    assert result.stderr == "128 live flows will end\n"
    assert result.stdout == f"stack {space.name}/edge: removed\n"


def test_down_names_the_finalizer_that_holds_a_stack(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "REMOVE_SECONDS", 0.5)
    space.up()
    patch = ("patch", "packetstack", "edge", "-n", space.name, "--type=merge", "-p")
    space.server.kubectl(*patch, '{"metadata": {"finalizers": ["packetstack.io/release"]}}')
    text = space.refused("down", "edge")
    assert "is still there after 0.5 s, with finalizers: packetstack.io/release; does the operator run?" in text
    space.server.kubectl(*patch, '{"metadata": {"finalizers": null}}')
    assert space.refused("get", "edge").endswith("there are: none")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("get", "no"), "stack no: not found in namespace "),
        (("scale", "no", "--replicas", "1"), "stack no: not found in namespace "),
        (("down", "no"), "stack no: not found in namespace "),
        (("logs", "no-1"), 'pods "no-1" not found'),
        (("move", "edge", "--buckets", "0-9", "--engine", "1"), "buckets: the operator decides who owns them"),
        (("upgrade", "--agent"), "agents: are restarted by their DaemonSet"),
        (("upgrade", "--agent", "--end-flows"), "--end-flows: name a stack instead of --agent"),
        (("scale", "edge", "--replicas", "1000", "--timeout", "0"), "stack edge: 0 of 1000 engines are ready"),
        (("explain", "edge", "tcp", "10.0.0.1:1", "192.0.2.10:80"), "stack edge: has no engine yet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said_in_one_line(space: Space, words: tuple[str, ...], line: str) -> None:
    space.up()
    assert space.refused(*words).startswith(line)


def test_options_of_a_host_and_of_a_cluster_do_not_mix(space: Space, tmp_path: Path) -> None:
    assert space.refused("up", space.file(), "--uplink", "eth1").startswith("--uplink: is for the agent of this host")
    assert space.refused("up", space.file(), "--metrics-listen", "127.0.0.1:1").startswith("--metrics-listen: is for")
    other = space.file(EDGE.replace("name: edge", "name: edge\n  namespace: elsewhere"))
    assert "metadata.namespace is elsewhere; use --namespace elsewhere" in space.refused("up", other)
    result = CliRunner().invoke(main, ["--run-dir", str(tmp_path), "get", "-n", "default"])
    assert result.exit_code == 2
    assert "--run-dir is for the agent of this host" in result.stderr


def test_a_cluster_is_chosen_by_options_before_or_after_the_verb(space: Space) -> None:
    space.up()
    where = ["--kubeconfig", str(space.server.kubeconfig), "-n", space.name]
    for words in ([*where, "get", "edge"], ["get", "edge", *where], [*where[:2], "get", "edge", *where[2:]]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.stderr
        assert "edge" in result.stdout


def test_a_server_or_kubeconfig_that_is_not_there_is_named(space: Space, tmp_path: Path) -> None:
    assert space.refused("get", kubeconfig=tmp_path / "none").startswith("kubeconfig: No configuration found; use")
    dead = tmp_path / "dead"
    dead.write_text(space.server.kubeconfig.read_text().replace(space.server.server, "https://127.0.0.1:1"))
    text = space.refused("get", kubeconfig=dead)
    assert text.startswith("API server https://127.0.0.1:1: cannot be reached: ")
    words = ["--kubeconfig", str(space.server.kubeconfig), "--context", "none", "get"]
    assert why(CliRunner().invoke(main, words)).startswith("kubeconfig: ")


def findings(space: Space, **more: Any) -> tuple[int, list[tuple[str, str, str]]]:
    """Exit code, and (result, where, message with remedy) of each check."""
    result = space.run("preflight", "-o", "json", **more)
    found = json.loads(result.stdout)
    return result.exit_code, [(c["result"], c["where"], f"{c['message']}; {c['remedy']}") for c in found]


def test_preflight_names_what_a_bare_cluster_lacks(space: Space) -> None:
    code, found = findings(space)
    assert code == 1
    assert ("ok", "cluster", "CRD packetstacks.packetstack.io; ") in found
    assert [m.split(";")[0] for r, w, m in found if r == "missing" and w == "cluster"] == ["no operator", "no agents"]
    text = space.run("preflight")
    assert text.exit_code == 1
    # Namespaces of other tests may be going meanwhile.
    lines = [line for line in text.stdout.splitlines() if " namespace " not in line]
    assert len(lines) == len([f for f in found if not f[1].startswith("namespace ")]), "one line each"


def test_preflight_asks_for_the_oldest_version_that_the_chart_takes() -> None:
    chart = yaml.safe_load((ROOT / "charts/packetstack/Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={'.'.join(map(str, preflight_cluster.OLDEST_KUBERNETES))}.0-0"


def test_preflight_names_a_kind_of_another_version(space: Space) -> None:
    name, mark = "flowtables.packetstack.io", crds.SCHEMA_HASH
    right = next(d for d in crds.definitions() if d["metadata"]["name"] == name)["metadata"]["annotations"][mark]
    space.server.kubectl("annotate", "--overwrite", "crd", name, f"{mark}=0123456789abcdef")
    _, found = findings(space)
    space.server.kubectl("annotate", "--overwrite", "crd", name, f"{mark}={right}")
    assert any(r == "warning" and f"CRD {name} is of another version" in m for r, _, m in found)


def test_preflight_names_what_each_stack_lacks(space: Space) -> None:
    interfaces = {
        "net": "attachment: {networkAttachmentDefinition: engines}",
        "vf": "devicePlugin: {resourceName: example.org/vf, networkAttachmentDefinition: other/vfs}",
        "dra": "resourceClaim: {resourceClaimTemplateName: edge-vf}",
    }
    for n, (name, interface) in enumerate(interfaces.items()):
        text = EDGE.replace("name: edge", f"name: {name}").replace("198.51.100.0", f"198.51.100.{4 * n}")
        space.up(f"{text}  engine: {{hugePages: {{size: 64Mi}}, memory: 256Mi, interface: {{{interface}}}}}\n")
    space.server.kubectl("label", "namespace", space.name, "pod-security.kubernetes.io/enforce=baseline")
    _, found = findings(space)
    missing = {(w, m) for r, w, m in found if r == "missing"}
    for name, lacking in (
        ("net", "no node has hugepages-2Mi enough"),
        ("net", "the cluster has no NetworkAttachmentDefinitions; install Multus"),
        ("vf", "no node has example.org/vf enough"),
        ("dra", "no ResourceClaimTemplate edge-vf"),
    ):
        assert any(w == f"stack {space.name}/{name}" and m.startswith(lacking) for w, m in missing), (name, missing)
    remedy = f"kubectl label namespace {space.name} pod-security.kubernetes.io/enforce=privileged --overwrite"
    assert any(w == f"namespace {space.name}" and m.endswith(remedy) for w, m in missing)


def test_preflight_says_what_it_may_not_see(space: Space) -> None:
    few = space.server.kubeconfig_for(f"stranger-{space.name}")
    code, found = findings(space, kubeconfig=few)
    assert code == 0, "nothing is known to be missing"
    assert {r for r, _, _ in found} == {"ok", "unknown"}
    assert any("nodes cannot be listed" in m for _, _, m in found)


def test_commands_for_a_host_do_not_load_the_kubernetes_client() -> None:
    line = "import packetstack_cli.main, sys; print([m for m in sys.modules if m.split('.')[0] == 'kubernetes'])"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
