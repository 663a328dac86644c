"""What this host needs for stacks, what of it is there, and what to do about the rest. Changes nothing."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packetstack_cli.checks import Check, Result, kernel
from packetstack_core.preconditions import FORWARDING, forwarding

_RESULTS: dict[str, Result] = {"ok": "ok", "warning": "warning", "missing": "missing", "unknown": "unknown"}


def examine(firewall: Sequence[Mapping[str, str]] = (), root: Path = Path("/")) -> list[Check]:
    """This one. `firewall`: what was found in its packet filter; `root`: where its /proc and /sys are."""
    return [*_host(root), *(Check(_RESULTS[f["result"]], "host", f["message"], f["remedy"]) for f in firewall)]


def _host(root: Path) -> Iterator[Check]:
    def check(good: bool, message: str, lacking: str, remedy: str, otherwise: Result = "missing") -> Check:
        return Check("ok", "host", message) if good else Check(otherwise, "host", lacking, remedy)

    if os.geteuid() != 0:
        yield Check("missing", "host", "you are not root", "an agent loads BPF programs: run packetstack as root")
    yield kernel("host", platform.release())
    yield check(
        _text(root / "sys/kernel/realtime") != "1",
        "the kernel is not PREEMPT_RT", "the kernel is PREEMPT_RT (/sys/kernel/realtime is 1)",
        "use one that is not: a handover counts on packets being handled without interruption on a CPU",
    )  # fmt: skip
    yield check(
        (root / "sys/kernel/btf/vmlinux").exists(),
        "the kernel describes its types (BTF)", "no /sys/kernel/btf/vmlinux", "use a kernel with CONFIG_DEBUG_INFO_BTF",
    )  # fmt: skip
    mounts = [line.split() for line in _text(root / "proc/mounts").splitlines()]
    yield check(
        any(len(m) > 2 and m[1] == "/sys/fs/bpf" and m[2] == "bpf" for m in mounts),
        "BPF file system at /sys/fs/bpf", "no BPF file system at /sys/fs/bpf",
        "mount -t bpf bpf /sys/fs/bpf (needed in a cluster)", "warning",
    )  # fmt: skip
    for version, name in FORWARDING.items():
        off = forwarding(version, _text(root / "proc/sys" / name.replace(".", "/")) == "1")
        if off is None:
            yield Check("ok", "host", f"{name}=1")
        else:
            remedy = f"sysctl -w {name}=1" + (" for stacks with IPv6 addresses" if version == 6 else "")
            yield Check("missing" if version == 4 else "warning", "host", f"{name}=0", remedy)
    yield Check("ok", "host", f"{os.cpu_count()} CPUs, huge pages: {_huge_pages(root)}")
    for card in sorted((root / "sys/class/net").glob("*/device/sriov_totalvfs")):
        name, made = card.parts[-3], _text(card.with_name("sriov_numvfs"))
        free = len(list(card.parent.glob("virtfn*/net/*")))
        remedy = "" if made != "0" else f"for engines with VFs: echo N > /sys/class/net/{name}/device/sriov_numvfs"
        yield Check("ok", "host", f"{name}: {made} of {_text(card)} VFs, {free} of them are nobody's", remedy)


def _huge_pages(root: Path) -> str:
    sizes = []
    for directory in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        total = int(_text(directory / "nr_hugepages") or 0)
        if total:
            size = int(directory.name.removeprefix("hugepages-").removesuffix("kB")) // 1024
            sizes.append(f"{total} of {size} MiB ({_text(directory / 'free_hugepages')} free)")
    return ", ".join(sizes) or "none"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
