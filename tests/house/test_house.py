"""The rules of the house: layers, style, documents that are true, and nothing that names one machine."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.house.exported import of_an_engine, of_the_agent, of_the_operator

from packetstack_core import abi
from packetstack_core.assignment import State
from packetstack_core.reasons import ConditionReason, EventReason

ROOT = Path(__file__).resolve().parents[2]
MANY = 5
"""A rule that looks at less than this has lost sight of what it is for."""
PROGRAMS = ("core", "agent", "engine", "cli", "operator")
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def tracked() -> list[Path]:
    """Files of the repository: what git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def tool(name: str) -> str:
    """A program of the environment that runs the tests, or of PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed; run make setup"
    return found


def run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_only_go_downwards() -> None:
    run(tool("lint-imports"))


def test_operator_directory_never_shadows_the_standard_module() -> None:
    assert not (ROOT / "operator/__init__.py").exists()


def test_every_c_file_names_its_licence_in_the_first_line() -> None:
    sources = [path for path in tracked() if path.suffix in {".c", ".h"}]
    assert len(sources) > MANY
    for path in sources:
        first = path.read_text().split("\n", 1)[0]
        assert "SPDX-License-Identifier:" in first, f"{path.relative_to(ROOT)}: no SPDX line"
        if path.name.endswith(".bpf.c"):
            assert "GPL-2.0" in first, f"{path.relative_to(ROOT)}: the kernel takes only GPL-compatible programs"


# Spelled in pieces so that this file passes its own test.
FORBIDDEN = [
    "/" + "work/",
    "/tmp" + "/v/",
    "/tmp" + "/briefs",
    "/" + "opt/wheels",
    r"\b" + "py" + r"env\b",
    "index-" + "url",
    "chat" + "gpt",
    r"\bclau" + r"de\b",
    "generated" + " with",
]


def test_no_file_names_a_machine_a_registry_or_how_it_was_made() -> None:
    pattern = re.compile("|".join(FORBIDDEN), re.IGNORECASE)
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def in_documents(pattern: str) -> list[tuple[Path, str]]:
    """Document and text of each match in it; of alternatives the one that matched."""
    found = [
        (document, match[match.lastindex or 0])
        for document in DOCUMENTS
        for match in re.finditer(pattern, document.read_text(), re.MULTILINE)
    ]
    assert len(found) > MANY, f"{pattern} finds next to nothing in the documents any more"
    return found


def test_every_make_target_in_the_documents_exists() -> None:
    for document, name in in_documents(r"`make ([a-z-]+)|^[$#] make ([a-z-]+)"):
        assert name in make_targets(), f"{document.name} names make {name}"


def test_every_link_in_the_documents_leads_to_a_file() -> None:
    for document, target in in_documents(r"\]\(([^)#\s]+)[^)]*\)"):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def console_commands() -> list[tuple[str, str]]:
    """Each `packetstack ...` line of a console block, as (document, arguments)."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL):
            found += [
                (document.name, line) for line in re.findall(r"^[$#] (?:sudo |kubectl )?packetstack (.+)$", block, re.M)
            ]
    return found


def test_every_verb_and_option_in_the_documents_is_one_of_the_cli() -> None:
    import click

    from packetstack_cli.main import main

    assert isinstance(main, click.Group)
    commands = console_commands()
    assert len(commands) > MANY
    for document, line in commands:
        words = line.split("#")[0].split("|")[0].split()
        group_options = {option for parameter in main.params for option in parameter.opts}
        while words and words[0].startswith("-"):
            assert words[0].split("=")[0] in group_options, f"{document}: packetstack {line}: no option {words[0]}"
            words = words[1 if "=" in words[0] else 2 :]
        assert words, f"{document}: packetstack {line}: no verb"
        assert words[0] in main.commands, f"{document}: packetstack {line}: no verb {words[0]}"
        verb = main.commands[words[0]]
        options = {o for parameter in verb.params for o in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        for word in words[1:]:
            if word.startswith("-") and not word.lstrip("-").isdigit():
                assert word.split("=")[0] in options, f"{document}: packetstack {line}: {words[0]} has no {word}"


def drop_reasons() -> list[tuple[str, str]]:
    """(stage, reason as the metrics write it) of every drop counter of the director and of an engine's cores."""
    counters = {"director": "ps_director_counter", "host": "ps_host_counter", "engine": "ps_counter"}
    found = [
        (stage, name.partition("_DROP_")[2].lower())
        for stage, enum in counters.items()
        for name in abi.enum_names(enum).values()
        if "_DROP_" in name
    ]
    assert {stage for stage, _ in found} == set(counters), "an enum without a drop counter"
    return found


@pytest.mark.parametrize(("stage", "reason"), drop_reasons())
def test_every_drop_reason_is_explained(stage: str, reason: str) -> None:
    text = (ROOT / "docs/troubleshoot.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and f"`{reason}`" in line and stage in line]
    assert rows, f"docs/troubleshoot.md has no row for {stage} drop reason {reason}"


def documented_metrics() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Metrics of the agent's table and of the operator's, with their labels."""
    parts = (ROOT / "docs/metrics.md").read_text().split("\n## The operator\n")
    assert len(parts) == 2
    agents, operators = (
        {
            name: set(re.findall(r"`(\w+)`", labels))
            for name, labels in re.findall(r"^\| `(packetstack_\w+)` \|([^|]*)\|", part, re.MULTILINE)
        }
        for part in parts
    )
    return agents, operators


def test_every_metric_and_label_is_documented_and_every_documented_one_exists() -> None:
    agents, operators = documented_metrics()
    assert agents == of_the_agent()
    # A histogram stands there by its name alone.
    written = {
        n.removesuffix("_bucket"): labels
        for n, labels in of_the_operator().items()
        if not n.endswith(("_sum", "_count"))
    }
    assert operators == written
    text = (ROOT / "docs/metrics.md").read_text()
    assert set(re.findall(r"`(packetstack_engine_core_\w+?)(?:\{[^`]*)?`", text)) == of_an_engine()


def test_every_test_that_the_documents_name_exists() -> None:
    trees = [ast.parse(path.read_text()) for path in tracked() if path.match("tests/**/test_*.py")]
    there = {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for document, name in in_documents(r"`(test_\w+)`"):
        assert name in there, f"{document.name}: no test is called {name}"


def test_every_reason_of_the_list_is_given_somewhere() -> None:
    given = set()
    for path in tracked():
        if path.suffix == ".py" and path.parts[len(ROOT.parts)] in PROGRAMS and path.name != "reasons.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    given.add((node.value.id, node.attr))
    assert {name for kind, name in given if kind == "EventReason"} == set(EventReason.__members__)
    made = {reason.name for reason in ConditionReason if reason.startswith("FailedGet")}  # of a metric's type
    made |= {reason.name for reason in ConditionReason if reason in set(State)}  # of an engine's state
    made |= {
        "CREATE_CONTAINER_CONFIG_ERROR",
        "CREATE_CONTAINER_ERROR",
        "RUN_CONTAINER_ERROR",
    }  # as the kubelet calls it
    assert {name for kind, name in given if kind == "ConditionReason"} | made == set(ConditionReason.__members__)


def texts_of_programs() -> str:
    """All string constants of Python, which has them in pieces around what is filled in, and the sources in C."""
    found = []
    for path in tracked():
        if path.parts[len(ROOT.parts)] not in PROGRAMS:
            continue
        if path.suffix == ".py":
            nodes = ast.walk(ast.parse(path.read_text()))
            found += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        elif path.suffix == ".c":
            found.append(path.read_text())
    return "\n".join(found)


FILLED_IN = r"\.\.\.|\b[NM]\b|NAME|\d+|ps0|[\w./-]*/[\w./-]+|net\.ipv4\.ip_forward|packetstack-datapath"
"""What stands for a value in a message of the documents."""


def test_every_message_that_is_explained_is_one_that_a_program_writes() -> None:
    part = (ROOT / "docs/troubleshoot.md").read_text().partition("\n## Messages\n")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", part, re.MULTILINE)
    assert len(messages) > MANY
    texts = texts_of_programs()
    for message in messages:
        for piece in re.split(f"LayoutMismatch: |{FILLED_IN}", message):
            assert piece.strip(" :") in texts, f'no program writes "{message}": "{piece}" is not there'
