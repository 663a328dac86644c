"""What documents say about one host is true: their commands are run, in their order."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_core import reading

ROOT = Path(__file__).parents[2]


def blocks(document: str, *having: str) -> Iterator[str]:
    """Code blocks with all of these words."""
    yield from (block for block in code((ROOT / document).read_text()) if all(word in block for word in having))


def code(text: str, language: str = r"\w*") -> list[str]:
    """Its code blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def bash(script: str, directory: Path, **environment: str) -> str:
    """What it printed; the assertion has what it said when it failed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", script], cwd=directory, env={**os.environ, "PATH": path, **environment}, capture_output=True,
        text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_readme_leads_from_a_file_to_a_stack_and_back(tmp_path: Path) -> None:
    [file] = blocks("README.md", "kind: PacketStack")
    [commands] = blocks("README.md", "packetstack up web.yaml")
    (tmp_path / "web.yaml").write_text(file)
    with Lab("pkd-readme") as lab:
        for line in commands.replace("eth1", NODE_UPLINK).splitlines():
            command = f"nsenter --net=/run/netns/{lab.namespace('node')} {line.removeprefix('# ')}"
            bash(command, tmp_path, PACKETSTACK_RUN_DIR=str(lab.run_directory))
        assert not lab.run_directory.exists()


def tasks() -> dict[str, list[str]]:
    """Commands of docs/operate.md and the first ones of docs/troubleshoot.md, by the headings above them."""
    found: dict[str, list[str]] = {}
    for document in ("docs/operate.md", "docs/troubleshoot.md"):
        for section in (ROOT / document).read_text().split("\n## ")[1:]:
            lines = [line.removeprefix("# ") for block in code(section, "console") for line in block.splitlines()]
            if lines:
                found[section.splitlines()[0]] = lines
    return found


@pytest.fixture(scope="module")
def operated() -> Iterator[Lab]:
    with Lab("pkd-operate") as lab:
        yield lab


@pytest.mark.parametrize("task", [name for name in tasks() if name != "See it work"])  # that has tests of its own
def test_every_command_of_a_task_does_what_it_should(operated: Lab, task: str) -> None:
    environment = {"PACKETSTACK_RUN_DIR": str(operated.run_directory)}
    enter = f"nsenter --net=/run/netns/{operated.namespace('node')} "
    if task != "Start a stack":
        bash(f"{enter}packetstack up examples/web.yaml", ROOT, **environment)
    try:
        for line in tasks()[task]:
            assert line.startswith("packetstack "), line
            command = enter + line.replace("eth1", NODE_UPLINK).replace("eth2", "dn0")
            if line == "packetstack explain web":  # an autoscaler has something to explain once it has decided
                command = f"for i in {{1..60}}; do {command} && exit; sleep 0.5; done; exit 1"
            bash(command, ROOT, **environment)
    finally:
        bash(f"{enter}packetstack down --all", ROOT, **environment)
    assert not operated.run_directory.exists()


@pytest.fixture
def rooms() -> Iterator[str]:
    """What the names of network namespaces begin with; they are removed with all that runs in them."""
    prefix = "pkdoc-"
    yield prefix
    for name in ("client", "node", "server"):
        found = subprocess.run(["ip", "netns", "pids", prefix + name], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", prefix + name], capture_output=True, check=False)


def test_the_recipe_for_one_machine_scales_a_stack_by_real_traffic(rooms: str, tmp_path: Path) -> None:
    [commands] = blocks("docs/autoscaling.md", "ip netns add try-")
    script = re.sub(r"^# ", "", commands, flags=re.MULTILINE).replace("try-", rooms)
    # Shorter, and with the time that a person takes to look.
    script = script.replace("-d 40", "-d 15").replace("examples/", f"{ROOT}/examples/")
    script = re.sub(r"^(.*packetstack explain web)$", r"sleep 12\n\1", script, flags=re.MULTILINE)
    run_directory = "/run/packetstack-pkdoc"
    said = bash(script, tmp_path, PACKETSTACK_RUN_DIR=run_directory)
    assert re.search(r"from 1 to [234] engines|stays at [234] engines", said), said
    assert not Path(run_directory).exists()


def test_the_load_of_the_page_is_simulated_as_it_says(tmp_path: Path) -> None:
    [command] = blocks("docs/autoscaling.md", "packetstack simulate")
    [load] = blocks("docs/autoscaling.md", "seconds,Utilization")
    stack = yaml.safe_load((ROOT / "examples/autoscaled.yaml").read_text())
    targets = {
        "Utilization": {"type": "Utilization", "averageUtilization": 60},
        "NewFlowsPerSecond": {"type": "AverageValue", "averageValue": "15000"},
    }
    stack["spec"]["autoscaling"]["metrics"] = [
        {"type": "Engine", "engine": {"name": name, "target": target}} for name, target in targets.items()
    ]
    reading.parse(stack)
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack))
    (tmp_path / "load.csv").write_text(load)
    said = bash(command.removeprefix("$ "), tmp_path)
    assert re.search(r"^ *60 +[2-5] .*NewFlowsPerSecond", said, re.MULTILINE), said
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_the_listener_with_limits_is_one_that_is_taken() -> None:
    [text] = blocks("docs/operate.md", "slowStartSeconds")
    web = yaml.safe_load((ROOT / "examples/web.yaml").read_text())
    web["spec"] |= yaml.safe_load(text)
    assert reading.parse(web).spec.listeners[0].limits.max_flows_per_client
