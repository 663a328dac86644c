"""The list of reasons, and the tables of the documents that are made from it."""

import re
from pathlib import Path

import pytest

from packetstack_core.autoscaling import rounds
from packetstack_core.reasons import (
    AUTOSCALER,
    BAD,
    ENGINE,
    VERTICAL,
    ConditionReason,
    EventReason,
    Says,
    fill,
    named,
    why_not,
)

TROUBLESHOOT = Path(__file__).resolve().parents[2] / "docs/troubleshoot.md"


def test_the_tables_of_the_documents_are_those_of_the_list() -> None:
    text = TROUBLESHOOT.read_text()
    assert fill(text) == text, "run: python -m packetstack_core.reasons docs/troubleshoot.md"


def test_every_reason_stands_in_the_documents_tables() -> None:
    rows = [line for line in TROUBLESHOOT.read_text().splitlines() if line.startswith("|")]
    assert len(EventReason) > 40
    assert len(ConditionReason) > 60
    for reason in (*EventReason, *ConditionReason):
        assert any(f"`{reason}`" in row for row in rows), reason


def test_a_document_without_a_table_is_refused() -> None:
    text = TROUBLESHOOT.read_text()
    with pytest.raises(LookupError, match="no table warnings"):
        fill(text.replace("<!-- end of warnings -->", ""))


def test_every_reason_is_what_kubernetes_takes_and_says_what_it_means() -> None:
    for event in EventReason:
        assert re.fullmatch(r"[A-Z][A-Za-z]{1,63}", event), event
        assert event.meaning, event
    for reason in ConditionReason:
        assert re.fullmatch(r"[A-Z][A-Za-z]{1,63}", reason), reason
        assert reason.says, reason
        assert all(says.meaning for says in reason.says), reason
        assert len({(says.condition, says.status) for says in reason.says}) == len(reason.says), reason


def test_what_is_bad_is_a_warning() -> None:
    assert Says("Available", "False", "").kind == "Warning"
    assert Says("Available", "True", "").kind == "Normal"
    assert Says("Degraded", "True", "").kind == "Warning"
    assert Says("Degraded", "False", "").kind == "Normal"
    assert Says("FirewallOpen", "Unknown", "").kind == "Warning"
    assert Says("Progressing", "True", "").kind == Says("Progressing", "False", "").kind == "Normal"
    assert ConditionReason.AS_EXPECTED.kind == "Normal"
    assert ConditionReason.MAY_DROP_PACKETS.kind == "Warning"


def test_what_is_bad_says_what_to_do() -> None:
    for reason in ConditionReason:
        for says in reason.says:
            obvious = reason is ConditionReason.NO_REPLICAS
            assert says.kind == "Normal" or says.remedy or obvious, (reason, says.condition)


def test_a_reason_that_is_none_of_the_condition_is_found() -> None:
    assert why_not("Degraded", "True", ConditionReason.NO_AGENT) == ""
    assert "no reason for Degraded to be False" in why_not("Degraded", "False", ConditionReason.NO_AGENT)
    assert "no reason for Available to be True" in why_not("Available", "True", ConditionReason.ENGINES_STARTING)


def test_a_reason_is_found_by_its_name() -> None:
    assert named("EngineLost") is EventReason.ENGINE_LOST
    assert named("NoAgent") is ConditionReason.NO_AGENT
    with pytest.raises(LookupError, match="Nonsense"):
        named("Nonsense")


def test_conditions_that_the_list_tells_apart_are_there() -> None:
    known = {says.condition for reason in ConditionReason for says in reason.says}
    assert known >= {*BAD, *AUTOSCALER, *VERTICAL, *ENGINE}
    assert AUTOSCALER == rounds.CONDITIONS
