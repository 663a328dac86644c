"""`packetstack-operator`."""

import argparse
import asyncio
import ctypes
import gc
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import kopf
from aiohttp import web
from kubernetes.aio import client
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock
from prometheus_client import generate_latest

from packetstack_core import crds
from packetstack_core.backing_off import CONNECT_SECONDS
from packetstack_operator.applying import MANAGER, TOKEN, Api
from packetstack_operator.keeping import Keepers
from packetstack_operator.loads import DEFAULT_PORT, Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.ports import Refused
from packetstack_operator.watching import Forgetful, register

TIDY_SECONDS = 60.0

log = logging.getLogger("packetstack_operator")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="packetstack-operator", description="Keeps PacketStack resources.")
    parser.add_argument(
        "--namespace", action="append", default=[], help="serve this namespace; repeatable (default: all)"
    )
    parser.add_argument("--listen", default=":8080", help="address of /metrics and /healthz (default: %(default)s)")
    parser.add_argument(
        "--image",
        default=os.environ.get("PACKETSTACK_IMAGE", ""),
        help="image of engines whose stack names none (default: $PACKETSTACK_IMAGE)",
    )
    parser.add_argument(
        "--lease",
        metavar="NAMESPACE/NAME",
        help="act only while holding this Lease, so that a second operator may stand by",
    )
    parser.add_argument(
        "--agent-port",
        type=int,
        default=DEFAULT_PORT,
        help="port of the agents, where they say how busy engines are (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="log each write, and what kopf does")
    args = parser.parse_args(arguments)
    if not args.image:
        parser.error("--image: is missing; use the image of this operator, or set PACKETSTACK_IMAGE")
    if args.lease and args.lease.count("/") != 1:
        parser.error(f'--lease: "{args.lease}" is not a lease; use NAMESPACE/NAME')
    if not 0 < args.agent_port < 65536:
        parser.error(f"--agent-port: {args.agent_port} is not a port; use one from 1 to 65535")
    host, colon, port = args.listen.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        parser.error(f'--listen: "{args.listen}" is not an address; use one as in ":8080" or "127.0.0.1:8080"')
    args.host, args.port = host.strip("[]") or None, int(port)
    return args


def login(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo | None:
    """As the pod's service account, else as $KUBECONFIG says: kopf shall not guess."""
    if TOKEN.exists():
        found = kopf.login_with_service_account(settings=settings)
        # The address that every pod is given; the name would need a cluster DNS.
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if found is None or not host:
            return found
        return replace(found, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")
    return kopf.login_with_kubeconfig(settings=settings)


def settle(settings: kopf.OperatorSettings, namespaced: bool) -> None:
    """Settings of kopf that differ from its own."""
    settings.posting.loggers = False
    settings.posting.reporting_component = MANAGER
    settings.persistence.finalizer = "packetstack.io/release"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="packetstack.io", v1=False)
    settings.persistence.diffbase_storage = Forgetful()
    settings.peering.standalone = True
    # Other people's pods and slices are many: the API server keeps them back.
    for kind in ("pods", "poddisruptionbudgets"):
        settings.watching.label_selectors[kind] = "packetstack.io/stack"
    settings.watching.label_selectors["endpointslices"] = "kubernetes.io/service-name"
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 30
    settings.networking.request_timeout = 30
    # An API server that was away is found again in seconds; kopf's own pauses grow to 21 s, and then it gives up.
    settings.networking.error_backoffs = Pauses()
    # Definitions and namespaces may not be read with rights in one namespace only.
    settings.scanning.disabled = namespaced
    # A task for each object that has changed lately: after its batch it is not needed.
    settings.queueing.idle_timeout = 1.0
    settings.background.instant_exit_timeout = 0.5


class Pauses:
    """Seconds between attempts of kopf, without an end."""

    def __iter__(self) -> Iterator[float]:
        yield from CONNECT_SECONDS
        yield from itertools.repeat(CONNECT_SECONDS[-1])


async def compare_definitions(api: Api, metrics: Metrics) -> str:
    """Kinds whose definitions are not those of this version, as in "FlowTable, PacketStack"."""
    outdated = []
    for definition in crds.definitions():
        name, kind = definition["metadata"]["name"], definition["spec"]["names"]["kind"]
        right = definition["metadata"]["annotations"][crds.SCHEMA_HASH]
        try:
            found = await api.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
        except Refused as e:
            if e.status != 404:
                continue  # no right to look
            have = "missing"
        else:
            have = found["metadata"].get("annotations", {}).get(crds.SCHEMA_HASH, "unknown")
        metrics.outdated.labels(kind).set(have != right)
        if have != right:
            log.warning(
                "CRD %s: its schema is %s and not %s, so that new fields are lost; apply the CRDs of this version",
                name,
                have,
                right,
            )
            outdated.append(kind)
    return ", ".join(outdated)


async def serve(args: argparse.Namespace) -> int:
    """Until a signal comes. Returns the exit status."""
    metrics = Metrics()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    api = await Api.connect()
    runner = await listen(args.host, args.port, metrics)
    try:
        if args.lease:
            return await lead(args, api, metrics, stop)
        await operate(args, api, metrics, stop)
        return 0
    finally:
        await runner.cleanup()
        await api.close()


async def listen(host: str | None, port: int, metrics: Metrics) -> web.AppRunner:
    """Serve /metrics and /healthz."""

    async def show(_: web.Request) -> web.Response:
        text = generate_latest(metrics.registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def alive(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", show), web.get("/healthz", alive)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


async def tidy() -> None:
    """Give back the memory that a burst took, once a minute, for ever.

    When many stacks come at once, as at the start, the C library is left with pages that are free but for a few bytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:  # other C libraries have none
        await asyncio.sleep(TIDY_SECONDS)
        trim(0)


async def operate(args: argparse.Namespace, api: Api, metrics: Metrics, stop: asyncio.Event) -> None:
    """Keep the stacks until `stop` is set."""
    loads = Loads(metrics, args.agent_port)
    keepers = Keepers(api, metrics, args.image, loads)
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(login)
    register(registry, keepers)

    async def ended(**_: Any) -> None:
        stop.set()  # kopf takes the signals, and would wait 5 s for its own wait for this flag

    kopf.on.cleanup(registry=registry)(ended)
    settings = kopf.OperatorSettings()
    settle(settings, bool(args.namespace))
    keepers.outdated = await compare_definitions(api, metrics)
    metrics.leader.set(1)
    log.info("serving %s", ", ".join(args.namespace) or "all namespaces")
    # Kopf would ask for the user's name, and a container's has none.
    identity: Any = f"{MANAGER}@{socket.gethostname()}"
    # What was imported lives as long as the process: 80,000 objects, of which each full collection took 50 ms.
    gc.freeze()
    tidying = asyncio.create_task(tidy())
    try:
        await kopf.operator(
            identity=identity,
            registry=registry,
            settings=settings,
            clusterwide=not args.namespace,
            namespaces=args.namespace,
            stop_flag=stop,
        )
    finally:
        tidying.cancel()
        metrics.leader.set(0)
        await loads.close()


class Lock(LeaseLock):
    """A Lease. Its own way to create one gives `pretty` a boolean, which the client refuses (kubernetes 37.0)."""

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """Whether it could be made."""
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, body)
        except client.ApiException as e:
            log.warning(
                "lease %s/%s: cannot be made (%s), so no operator acts; see its Role", namespace, name, e.reason
            )
            return False
        return True


async def lead(args: argparse.Namespace, api: Api, metrics: Metrics, stop: asyncio.Event) -> int:
    """Operate while the Lease is ours. Ends with status 1 when it is lost: the pod starts again and stands by."""
    namespace, _, name = args.lease.partition("/")
    lock = Lock(name, namespace, f"{socket.gethostname()}_{os.getpid()}", api.client)
    lost = asyncio.Event()

    async def started() -> None:
        try:
            await operate(args, api, metrics, stop)
        finally:
            stop.set()  # whatever ended it: the lease is not held for nothing

    async def ended() -> None:
        lost.set()

    config = electionconfig.Config(lock, 15, 10, 2, onstarted_leading=started, onstopped_leading=ended)
    election = asyncio.create_task(leaderelection.LeaderElection(config).run())
    waiting = [election, asyncio.create_task(stop.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    failed = election.exception() if election.done() else None
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    if failed is not None:
        raise failed
    if lost.is_set():
        log.error("lease %s: was lost, another operator acts; this one ends and stands by again", args.lease)
    return int(lost.is_set())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until told to stop."""
    args = options(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    try:
        sys.exit(asyncio.run(serve(args)))
    except OSError as e:
        sys.exit(f"packetstack-operator: {e}")
