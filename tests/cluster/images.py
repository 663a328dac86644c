"""OCI archives without a registry: the sandbox of every pod, and small images for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.processes import run

PAUSE = "localhost/pause:1"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# Reaps and waits; ends at once when told to. As pid 1 it would otherwise not see SIGTERM.
_PAUSE_SOURCE = """
#include <signal.h>
#include <unistd.h>

static void end(int signal) { _exit(0); }

int main(void)
{
	signal(SIGTERM, end);
	signal(SIGINT, end);
	signal(SIGCHLD, SIG_IGN);
	for (;;)
		pause();
}
"""


def pause(directory: Path) -> Path:
    """The archive of the image `PAUSE`, a static program that does nothing; made in `directory` unless it is there."""
    archive = directory / "pause.tar"
    if not archive.exists():
        source, program = directory / "pause.c", directory / "pause"
        source.write_text(_PAUSE_SOURCE)
        run("gcc", "-O2", "-static", "-s", "-o", program, source)
        write_archive(archive, PAUSE, {"/pause": program.read_bytes()}, ["/pause"])
    return archive


def write_archive(archive: Path, name: str, files: Mapping[str, bytes], entrypoint: Sequence[str]) -> None:
    """Write an image of one layer from scratch: `files` by absolute path, all executable."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path, content in files.items():
            _add(tar, path.lstrip("/"), content, mode=0o755)
    compressed = gzip.compress(layer.getvalue(), 1, mtime=0)
    target = {"architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()), "os": "linux"}
    config = _document(
        {
            **target,
            "config": {"Entrypoint": list(entrypoint)},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer.getvalue())]},
        }
    )
    manifest = _document(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", compressed)],
        }
    )
    named = {
        **_descriptor("application/vnd.oci.image.manifest.v1+json", manifest),
        "platform": target,
        "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name},
    }
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [named]}
    half = archive.with_suffix(".half")
    with tarfile.open(half, "w") as tar:
        _add(tar, "oci-layout", _document({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", _document(index))
        for blob in (config, manifest, compressed):
            _add(tar, "blobs/" + _digest(blob).replace(":", "/"), blob)
    half.rename(archive)


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _document(value: object) -> bytes:
    return json.dumps(value).encode()


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}
