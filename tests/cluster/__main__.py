"""`python -m tests.cluster up|down|binaries`: a cluster to look at, which stays until it is taken down.

`up` prints the path of its kubeconfig. A process in the background keeps the cluster; it writes to keeper.log.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading

from tests.cluster import kubernetes_binaries
from tests.cluster.cluster import Cluster
from tests.cluster.install import install
from tests.cluster.processes import ClusterError, wait_until
from tests.cluster.slots import KEPT, STATE, Slot

KEEPER = STATE / "keeper"  # its pid, locked while it lives
LOG = STATE / "keeper.log"
KUBECONFIG = STATE / "kubeconfig"


def main() -> int:
    verbs = {"up": up, "down": down, "binaries": binaries, "keep": keep}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        print("usage: python -m tests.cluster up|down|binaries", file=sys.stderr)
        return 2
    try:
        verbs[sys.argv[1]]()
    except (ClusterError, kubernetes_binaries.BinaryError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def up() -> None:
    binaries()
    if not _keeper():
        STATE.mkdir(parents=True, exist_ok=True)
        KUBECONFIG.unlink(missing_ok=True)
        with LOG.open("w") as log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster", "keep"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def settled() -> bool:
            return KUBECONFIG.exists() or keeper.poll() is not None

        wait_until(settled, f"cluster up (see {LOG})", timeout_seconds=600)
        if not KUBECONFIG.exists():
            raise ClusterError(f"{LOG}: {LOG.read_text().strip().splitlines()[-1]}")
    print(f"export KUBECONFIG={KUBECONFIG}")
    if said := LOG.read_text().strip():
        raise ClusterError(f"the cluster is up without PacketStack: {said}")


def down() -> None:
    pid = _keeper()
    if pid:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not _keeper(), "cluster down", timeout_seconds=60)
    else:  # of a killed keeper only names are left
        with Slot(KEPT) as slot:
            Cluster(slot).stop()
    for path in (KEEPER, KUBECONFIG, LOG):
        path.unlink(missing_ok=True)


def binaries() -> None:
    for name in (*kubernetes_binaries.BUILT, *kubernetes_binaries.UNPACKED, *kubernetes_binaries.DEBIAN):
        kubernetes_binaries.find(name)


def keep() -> None:
    """The process in the background: holds the cluster until SIGTERM."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with KEEPER.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
        with Slot(KEPT) as slot, Cluster(slot) as cluster:
            try:
                install(cluster)
            except ClusterError as error:  # the cluster shows why
                print(error, file=sys.stderr, flush=True)
            half = KUBECONFIG.with_suffix(".half")
            half.touch(mode=0o600)
            half.write_bytes(cluster.kubeconfig.read_bytes())
            half.rename(KUBECONFIG)
            over.wait()


def _keeper() -> int | None:
    """The pid of the living keeper."""
    if not KEEPER.exists():
        return None
    with KEEPER.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(held.read() or 0) or None
    return None


if __name__ == "__main__":
    sys.exit(main())
