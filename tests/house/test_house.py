"""The rules of the house: layers, style, documents that are true, and nothing that names one machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
C_HEADER = ROOT / "include/packetstack/abi.h"


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
    for path in tracked():
        if path.suffix in {".c", ".h"}:
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
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_the_documents_exists(document: Path) -> None:
    for name in re.findall(r"`make ([a-z]+)|^\$ make ([a-z]+)", document.read_text(), re.MULTILINE):
        assert (name[0] or name[1]) in make_targets(), f"{document.name} names make {name[0] or name[1]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_the_documents_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
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
    for document, line in console_commands():
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


def enum_members(name: str) -> list[str]:
    body = re.search(r"enum " + name + r" \{(.*?)\};", C_HEADER.read_text(), re.DOTALL)
    assert body, f"abi.h has no enum {name}"
    without_comments = re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL)
    return re.findall(r"\b(PS_\w+)", without_comments)


def drop_reasons() -> list[tuple[str, str]]:
    """(stage, reason as the metrics write it) of every drop counter of the director and of an engine's cores."""
    found = []
    for stage, enum, prefix in (
        ("director", "ps_director_counter", "PS_D_DROP_"),
        ("host", "ps_host_counter", "PS_H_DROP_"),
        ("engine", "ps_counter", "PS_C_DROP_"),
    ):
        found += [
            (stage, member.removeprefix(prefix).lower()) for member in enum_members(enum) if member.startswith(prefix)
        ]
    return found


@pytest.mark.parametrize(("stage", "reason"), drop_reasons())
def test_every_drop_reason_is_explained(stage: str, reason: str) -> None:
    text = (ROOT / "docs/troubleshoot.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and f"`{reason}`" in line and stage in line]
    assert rows, f"docs/troubleshoot.md has no row for {stage} drop reason {reason}"


def test_every_metric_of_the_agent_is_documented() -> None:
    source = (ROOT / "agent/packetstack_agent/metrics.py").read_text()
    text = (ROOT / "docs/metrics.md").read_text()
    for kind, name in re.findall(r"(Counter|Gauge)MetricFamily\(\s*\"(packetstack_\w+)\"", source):
        full = f"{name}_total" if kind == "Counter" else name
        assert f"`{full}`" in text, f"docs/metrics.md does not name {full}"


def test_every_test_that_the_documents_name_exists() -> None:
    there = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in ROOT.glob("tests/*/*.py")), re.M))
    for path in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)`", path.read_text()):
            assert name in there, f"{path.relative_to(ROOT)}: no test is called {name}"
