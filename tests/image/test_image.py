"""The container image: what is in it, what is not, and that every program of it runs as a pod would run it."""

import json
import re
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
NAME = "localhost/packetstack:dev"
ARCHIVE = ROOT / "build/image/packetstack.tar"
ENTRY_POINTS = ["kubectl-packetstack", "packetstack", "packetstack-agent", "packetstack-engine", "packetstack-operator"]
NOBODY_IN_PARTICULAR = "54321:54321"

pytestmark = pytest.mark.slow


def build() -> str:
    done = subprocess.run([ROOT / "deploy/build-image", NAME, ARCHIVE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


class Image:
    """The archive's manifest and configuration, and its layers unpacked over each other into `root`."""

    def __init__(self, archive: Path, root: Path) -> None:
        self.root = root
        with tarfile.open(archive) as tar:

            def member(name: str) -> Any:
                file = tar.extractfile(name)
                assert file is not None
                return file

            def blob(digest: str) -> Any:
                return member("blobs/" + digest.replace(":", "/"))

            self.index = json.load(member("index.json"))
            manifest = json.load(blob(self.index["manifests"][0]["digest"]))
            self.config = json.load(blob(manifest["config"]["digest"]))
            self.layer_bytes = [layer["size"] for layer in manifest["layers"]]
            for layer in manifest["layers"]:
                unpack = ["tar", "-xz", "-p", "-f", "-", "-C", root]
                with subprocess.Popen(unpack, stdin=subprocess.PIPE) as process:
                    assert process.stdin is not None
                    shutil.copyfileobj(blob(layer["digest"]), process.stdin)
                assert process.returncode == 0
        # A layer says so where it removes a file of a layer below.
        for mark in root.rglob(".wh.*"):
            gone = mark.with_name(mark.name.removeprefix(".wh."))
            if gone.is_dir() and not gone.is_symlink():
                shutil.rmtree(gone)
            else:
                gone.unlink(missing_ok=True)
            mark.unlink()

    @property
    def packages(self) -> Path:
        (found,) = self.root.glob("opt/packetstack/lib/python3*/site-packages")
        return found

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """In the image with its own environment, read-only, as a user that it has never heard of."""
        script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec chroot --userspec="$1" "$0" env -i "${@:2}"'
        line = ["unshare", "--mount", "bash", "-c", script, str(self.root), NOBODY_IN_PARTICULAR]
        return subprocess.run(
            [*line, *self.config["config"]["Env"], *command], capture_output=True, text=True, timeout=60
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    build()
    root = tmp_path_factory.mktemp("image") / "root"
    root.mkdir()
    root.chmod(0o755)
    return Image(ARCHIVE, root)


def test_nothing_is_built_when_nothing_has_changed(image: Image) -> None:
    # Three times, because somebody may be editing: what counts is that it comes to rest.
    assert any("up to date" in build() for _ in range(3))


def test_the_archive_is_loaded_under_the_name_it_was_built_with(image: Image) -> None:
    (manifest,) = image.index["manifests"]
    assert manifest["annotations"]["org.opencontainers.image.ref.name"] == NAME


@pytest.mark.parametrize("program", ENTRY_POINTS)
def test_every_entry_point_runs_read_only_and_as_any_user(image: Image, program: str) -> None:
    done = image.run(program, "--help")
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_all_entry_points_of_the_distribution_are_in_the_image(image: Image) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(project["scripts"]) == sorted(ENTRY_POINTS)
    assert {path.name for path in (image.root / "opt/packetstack/bin").iterdir()} > set(ENTRY_POINTS)


@pytest.mark.parametrize("program", ["packetstack-init", "packetstack-datapath"])
def test_native_programs_are_on_the_path_and_find_their_libraries(image: Image, program: str) -> None:
    assert image.run(program).stderr.startswith(f"usage: {program} ")


def test_the_agent_finds_its_library_and_programs(image: Image) -> None:
    code = """
import packetstack_agent.agent, packetstack_operator.main
from packetstack_core import abi
abi.lib()
for name in ("director.bpf.o", "host.bpf.o", "engine.bpf.o", "packetstack-init", "packetstack-datapath"):
    assert abi.native(name).is_file(), name
"""
    done = image.run("python3", "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_every_module_is_compiled_so_that_no_start_compiles_it_again(image: Image) -> None:
    """A .pyc holds date and size of its source in bytes 8..16 (PEP 552)."""
    modules = list(image.packages.rglob("*.py"))
    assert len(modules) > 500
    for source in modules:
        compiled = list((source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc"))
        assert compiled, f"{source.relative_to(image.root)} is not compiled"
        header = compiled[0].read_bytes()[:16]
        stat = source.stat()
        held = int.from_bytes(header[8:12], "little"), int.from_bytes(header[12:16], "little")
        assert held == (int(stat.st_mtime), stat.st_size), f"{source.relative_to(image.root)} was changed since"


def test_no_tool_of_the_build_is_in_the_image(image: Image) -> None:
    for directory in ("usr/bin", "usr/sbin", "usr/local/bin", "opt/packetstack/bin"):
        for path in (image.root / directory).iterdir():
            tool = r"(.*-)?(gcc|cc|g\+\+|cpp|clang|ld|as|make|ninja|meson|bpftool|git|pip3?)(-?[0-9.]+)?"
            assert not re.fullmatch(tool, path.name), path.relative_to(image.root)
    assert not (image.packages / "pip").exists()
    assert not (image.root / "source").exists()
    assert not (image.root / "usr/include").exists() or not list((image.root / "usr/include").iterdir())


def test_no_cache_and_no_log_of_the_build_is_in_the_image(image: Image) -> None:
    left = [*image.root.glob("root/.cache"), *image.root.glob("var/cache/apt/**/*.deb"), *image.root.glob("tmp/*")]
    left += [path for path in image.root.glob("var/lib/apt/lists/**/*") if path.is_file()]
    left += [path for path in image.root.glob("var/log/**/*") if path.is_file() and path.stat().st_size]
    assert not left


def hosts_of_this_machine() -> set[str]:
    """Where apt and pip of this machine fetch packages."""
    lines = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True
    ).stdout
    lines += subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout
    for file in (
        Path("/etc/pip.conf"),
        Path("~/.config/pip/pip.conf").expanduser(),
        Path("~/.pip/pip.conf").expanduser(),
    ):
        lines += file.read_text() if file.exists() else ""
    found = {urlsplit(address).hostname for address in re.findall(r"https?://[^\s\"';]+", lines)}
    return {host for host in found if host}


def test_nothing_of_the_configuration_of_the_machine_that_built_it_is_in_the_image(image: Image) -> None:
    for name in (
        "etc/apt/sources.list",
        "etc/apt/apt.conf",
        "etc/pip.conf",
        "run/ca.crt",
        "etc/resolv.conf",
        "etc/hosts",
    ):
        path = image.root / name
        assert not path.exists() or not path.read_bytes(), name
    assert (image.root / "etc/hostname").read_text().strip() in {"", "localhost"}
    texts = {"the image's configuration": json.dumps(image.config)}
    for path in image.root.glob("etc/**/*"):
        # A published Debian image brings the public mirror along.
        if path.is_file() and not path.is_symlink() and path.name != "debian.sources":
            texts[str(path.relative_to(image.root))] = path.read_text(errors="replace")
    for host in hosts_of_this_machine():
        for where, text in texts.items():
            assert not re.search(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])", text), f"{where} names {host}"


def test_its_environment_is_only_what_the_dockerfile_sets(image: Image) -> None:
    names = {entry.split("=")[0] for entry in image.config["config"]["Env"]}
    assert names == {"PATH", "HOME", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}


def test_its_labels_are_true(image: Image) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = image.config["config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == project["name"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]["text"]


def test_it_is_small_and_a_change_of_our_code_moves_only_a_few_megabytes(image: Image) -> None:
    assert ARCHIVE.stat().st_size < 100e6
    assert image.layer_bytes[-1] < 3e6
