"""Wrong usage of the command: exit code 2 and one line, whoever would have been asked."""

import pytest
from click.testing import CliRunner

from packetstack_cli.main import main


@pytest.mark.parametrize(
    ("verb", "words", "line"),
    [
        ("explain", "explain web tcp 10.0.0.1:1", "use PROTOCOL SOURCE:PORT DESTINATION:PORT, as in: tcp 10.0.0.1:40000 192.0.2.10:80"),
        ("explain", "explain web tcp 10.0.0.1 192.0.2.10:80", '"10.0.0.1" is not an address with a port; use 10.0.0.1:40000'),
        ("explain", "explain web tcp 10.0.0.1:99999 192.0.2.10:80", '"10.0.0.1:99999" is not an address with a port'),
        ("move", "move web", "use --queue SLOT:QUEUE --core CORE, or --buckets FIRST-LAST --engine SLOT"),
        ("move", "move web --queue 1 --core 0", '"1" is not understood; use SLOT:QUEUE, as in 1:3'),
        ("move", "move web --buckets 9-x --engine 1", '"9-x" is not understood; use FIRST-LAST, as in 0-99'),
        ("move", "move web --buckets 9-0 --engine 1", '"9-0" is not a range; use 0-9'),
        ("scale", "scale web --replicas -1", "-1 is not in the range 0<=x<=1000"),
        ("scale", "scale web", "Missing option '--replicas'"),
        ("upgrade", "upgrade", "use the NAME of a stack or engine, as `packetstack top` shows it, or --agent"),
        ("get", "get --nosuch", "No such option"),
        ("", "nosuch", "No such command 'nosuch'"),
        ("", "--nosuch get", "No such option"),
        ("get", "--run-dir /tmp get -n default", "--run-dir is for the agent of this host, the other options are for a cluster"),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2_and_one_line(verb: str, words: str, line: str) -> None:
    done = CliRunner().invoke(main, words.split(), prog_name="packetstack")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    where = f"packetstack {verb}".rstrip()
    assert done.stderr.startswith(f"{where}: ")
    assert done.stderr.endswith(f"; see {where} --help\n")


def test_a_command_without_any_words_shows_what_there_is() -> None:
    done = CliRunner().invoke(main, [], prog_name="packetstack")
    assert done.exit_code == 2
    assert "Commands:" in done.stderr
