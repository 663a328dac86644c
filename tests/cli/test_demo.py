"""`packetstack demo`, small: all its steps are taken, nothing breaks, and what it writes says so."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEPS = {"transfer": 10, "mirror": 5}
WRITTEN = {"transfer": ("report.json", "demo.png"), "mirror": ("mirror.json", "mirror.png")}


def shown(handover: str, place: Path) -> tuple[str, dict[str, Any], bytes]:
    """What it printed, its report and its picture."""
    done = subprocess.run(
        [sys.executable, "-m", "packetstack_cli.main", "demo", "--handover", handover, "--connections", "100",
         "--udp-flows", "20", "--seconds", "15", "--build-dir", str(place)],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report, picture = (place / name for name in WRITTEN[handover])
    return done.stdout, json.loads(report.read_text()), picture.read_bytes()


@pytest.mark.parametrize("handover", ["transfer", "mirror"])
def test_a_demo_takes_all_its_steps_and_breaks_nothing(handover: str, tmp_path: Path) -> None:
    said, report, picture = shown(handover, tmp_path)
    print(said)
    assert f"verdict: 0 broken of {report['connections']} connections" in said
    assert report["broken"] == 0
    assert report["connections"] >= 100
    assert [step["ok"] for step in report["steps"]] == [True] * STEPS[handover]
    assert picture.startswith(b"\x89PNG")
    if handover == "mirror":
        old, new = report["sets"]
        assert old["rejected"] != new["rejected"], "each rejects what is the other's"
        assert sum(old["rejected"].values()) > 0 < sum(new["rejected"].values())
