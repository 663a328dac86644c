"""The chart as Helm renders it."""

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.kubernetes_binaries import find

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/packetstack"
NAMESPACE = "packetstack-system"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))

Render = Callable[..., list[dict[str, Any]]]


@cache
def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Helm itself, with nothing but what it is given."""
    return subprocess.run([str(find("helm")), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def render() -> Render:
    """All objects that the chart gives for a values file or for `--set` arguments."""

    def objects(values: Path | None = None, *settings: str) -> list[dict[str, Any]]:
        arguments = ["template", "packetstack", str(CHART), "--namespace", NAMESPACE]
        arguments += ["--values", str(values)] if values else []
        for setting in settings:
            arguments += ["--set-json", setting]
        done = helm(*arguments)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return objects
