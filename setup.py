"""Builds the native parts (meson) into packetstack_core/native before the Python files are packed.

An editable install leaves that to `make build`, which rebuilds only what changed.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "meson"


class BuildNative(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            if shutil.which("meson") is None:
                raise SystemExit("packetstack: meson is not on PATH; install meson, ninja-build, clang and libbpf-dev")
            if not (BUILD / "build.ninja").exists():
                subprocess.run(["meson", "setup", str(BUILD), str(ROOT)], check=True)
            subprocess.run(["meson", "compile", "-C", str(BUILD)], check=True)
            subprocess.run(["meson", "install", "-C", str(BUILD), "--no-rebuild", "--quiet"], check=True)
        super().run()


class NativeDistribution(Distribution):
    """Carries compiled code, so its wheels are for one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildNative}, distclass=NativeDistribution)
