"""Builds of the datapath: what shard layout one has, and the copy that each set of engines on this host keeps of its own.

The installed build may be replaced by one of another layout while engines serve. Those that die are started again by the
copy in their set's directory, and an upgrade renews that copy. In a pod the image is the build, and nothing is copied.
"""

import errno
import os
import re
import secrets
import shutil
import subprocess
import time
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any

from packetstack_agent.errors import AgentError
from packetstack_agent.natives import ffi, lib
from packetstack_core import abi, shards

NAME = "packetstack-datapath"
ASK_SECONDS = 5.0


def name_of(form: Any) -> str:
    """Name of a layout from a `struct ps_shard_form`, as `packetstack_core.shards` has it."""
    numbers = array("H", bytes(ffi.buffer(ffi.addressof(form))))
    return ".".join(map(str, numbers)) if numbers[0] else shards.FIRST


def form_of(name: str) -> Any:
    """`struct ps_shard_form *` from the name of a layout. AgentError if it is none."""
    if not re.fullmatch(shards.PATTERN, name):
        raise AgentError(f'shard layout "{name}": is no name of one')
    form = ffi.new("struct ps_shard_form *")
    ffi.memmove(form, array("H", (min(int(n), 0xFFFF) for n in name.split("."))), ffi.sizeof("struct ps_shard_form"))
    return form


def own() -> str:
    """The layout that this agent was built with."""
    return name_of(lib().ps_own_form())


def installed() -> Path:
    """The build that is installed now."""
    return abi.native(NAME)


def shard_of(build: Path) -> str:
    """The shard layout of a build. Blocks; AgentError if it does not say."""
    try:
        found = build.stat()
        return _asked(build, (found.st_ino, found.st_size, found.st_mtime_ns))
    except (OSError, subprocess.SubprocessError) as e:
        raise AgentError(f"{build}: cannot be asked for its shard layout: {e}") from None


@lru_cache(maxsize=64)
def _asked(build: Path, _: tuple[int, int, int]) -> str:
    for pause in (0.05, 0.2, 0.0):
        try:
            said = subprocess.run([build, "--shard-form"], capture_output=True, timeout=ASK_SECONDS, check=False)
            break
        except OSError as e:  # a child that another thread has just forked may have a fresh copy open still
            if e.errno != errno.ETXTBSY or not pause:
                raise
            time.sleep(pause)
    name = said.stdout.decode(errors="replace").strip()
    if said.returncode == 2:  # it does not know the question
        return shards.FIRST
    if said.returncode or not re.fullmatch(shards.PATTERN, name):
        raise OSError(f"exit status {said.returncode}, {name[:80]!r}")
    return name


def keep(directory: Path, build: Path) -> Path:
    """Keep a copy of the build in the directory of a set, instead of the one before. Blocks; AgentError if it cannot be."""
    kept = directory / NAME
    fresh = directory / f".{NAME}.{secrets.token_hex(4)}"
    try:
        if os.statvfs(directory).f_flag & os.ST_NOEXEC:
            raise OSError("nothing below it may be executed (mount option noexec)")
        shutil.copyfile(build, fresh)
        fresh.chmod(0o755)
        fresh.replace(kept)  # processes of the one before go on
    except OSError as e:
        fresh.unlink(missing_ok=True)
        raise AgentError(f"{directory}: cannot keep a copy of {build}: {e}") from None
    return kept


def keep_if_possible(directory: Path, build: Path) -> Path:
    """Keep a copy; the build itself where that cannot be: as good, until another layout is installed. Blocks."""
    try:
        return keep(directory, build)
    except AgentError:
        return build


def renew(directory: Path, build: Path) -> None:
    """The set has this build from now on, of its own layout, for processes that start later. Blocks; AgentError, and it has
    the one before, if that cannot be. A set that keeps no copy has the installed build anyway."""
    if (directory / NAME).exists():
        keep(directory, build)


def of(directory: Path, shard: str) -> Path:
    """The build for engines of the set with this directory, whose memory has this shard layout: its copy, which is made if
    there is none yet. Blocks; AgentError if there is no build for it."""
    kept = directory / NAME
    if kept.exists() and shard_of(kept) == shard:
        return kept
    there = installed()
    if (has := shard_of(there)) != shard:
        raise AgentError(
            f"no build serves shard layout {shards.number(shard)}, that of its set: the installed one has layout "
            f"{shards.number(has)}; install one that has it"
        )
    return keep_if_possible(directory, there)
