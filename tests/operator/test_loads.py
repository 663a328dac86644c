"""What the operator knows of a stack's load, from agents that answer, do not, or answer nonsense."""

import asyncio
import http.server
import threading

import pytest
from prometheus_client import generate_latest
from tests.operator.counters import PlayedCounters

from packetstack_core.load import Snapshot
from packetstack_operator import loads as module
from packetstack_operator.loads import LoadError, Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import World

KEY = ("shop", "edge")


def world(address="127.0.0.1", node="node-0"):
    pod = {
        "metadata": {"name": "edge-1"},
        "spec": {"nodeName": node},
        "status": {"hostIP": address} if address else {},
    }
    return World(
        {"metadata": {"name": "edge", "namespace": "shop"}}, "image", {"spec": {"node": "node-0"}}, pods=(pod,)
    )


@pytest.fixture
def played():
    with PlayedCounters() as running:
        running.engines["shop.edge"] = {"edge-1": "Active", "edge-2": "Draining"}
        running.load["shop.edge"] = 0.5
        yield running


@pytest.fixture
async def loads(played):
    made = Loads(Metrics(), played.port)
    yield made
    await made.close()


def exported(loads):
    return generate_latest(loads.metrics.registry).decode()


async def test_the_load_is_what_happened_between_two_answers(loads, played):
    await loads.ask(KEY, world())
    assert loads.load(KEY, 15) is None
    await asyncio.sleep(0.02)  # less than a millisecond is no time to measure in
    await loads.ask(KEY, world())
    found = loads.load(KEY, 15)
    assert {e.name: round(e.utilization, 2) for e in found.engines} == {"edge-1": 0.5, "edge-2": 0.0}
    assert played.asked == ["/load?stack=shop.edge&buckets=0"] * 2
    assert 'packetstack_load_age_seconds{namespace="shop",stack="edge"} ' in exported(loads)


async def test_buckets_are_asked_for_on_their_own_and_only_two_answers_are_kept(loads, played):
    await loads.ask(KEY, world())
    for _ in range(4):
        await loads.ask(KEY, world(), buckets=True)
    assert loads.load(KEY, 15) is None
    assert len(loads.load(KEY, 1000, buckets=True).bucket_packets_per_second) == 1024
    assert len(loads._known[KEY, True].history._kept) == 2


async def test_an_answer_that_is_young_enough_is_not_asked_for_again(loads, played):
    await loads.ask(KEY, world(), age=60)
    await loads.ask(KEY, world(), age=60)
    assert len(played.asked) == 1
    await loads.ask(KEY, world(), buckets=True, age=60)
    await loads.ask(KEY, world())
    assert len(played.asked) == 3
    loads._known[KEY, False].answered -= 61
    await asyncio.gather(*(loads.ask(KEY, world(), age=60) for _ in range(3)))
    assert len(played.asked) == 4, "too old; and who waits for an answer takes it"


async def test_the_age_of_a_load_is_not_that_of_a_wall_clock_that_was_set_back(loads, played, monkeypatch):
    assert loads.age(KEY) == float("inf")
    await loads.ask(KEY, world())
    began = loads._known[KEY, False].answered
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: began + 31.0)
    assert loads.age(KEY) == 31.0


async def test_buckets_of_a_long_time_ago_say_nothing_of_now(loads, played, monkeypatch):
    await loads.ask(KEY, world(), buckets=True)
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)  # so that what was just read is too old
    await loads.ask(KEY, world(), buckets=True)
    assert loads.load(KEY, 1000, buckets=True) is None


async def test_two_who_ask_at_once_forget_nothing(loads, monkeypatch):
    times = iter([1.0, 2.0, 3.0])
    pauses = iter([0.0, 0.05, 0.0])

    async def get(*_):
        snapshot = Snapshot(next(times), ())
        await asyncio.sleep(next(pauses))
        return snapshot

    monkeypatch.setattr(loads, "_get", get)
    await loads.ask(KEY, world())
    await asyncio.gather(loads.ask(KEY, world()), loads.ask(KEY, world()))
    assert loads.load(KEY, 15) is not None


async def test_a_clock_that_is_set_back_delays_no_question(loads, played, monkeypatch):
    now = module.time.time()
    played.away = True
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(LoadError, match="no answer"):
        await loads.ask(KEY, world())
    played.away = False
    monkeypatch.setattr(module.time, "time", lambda: now - 86_400)
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 5.0)
    await asyncio.sleep(1.1)
    await loads.ask(KEY, world())


async def test_an_agent_that_does_not_answer_is_given_up_in_time_and_not_asked_at_once_again(
    loads, played, monkeypatch
):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.1)
    await loads.ask(KEY, world())
    played.away = True
    with pytest.raises(LoadError, match=r"no answer in 0\.1 s"):
        await loads.ask(KEY, world())
    with pytest.raises(LoadError, match="is asked again soon"):
        await loads.ask(KEY, world())
    assert len(played.asked) == 2
    assert 'packetstack_load_errors_total{reason="Unreachable"} 1.0' in exported(loads)
    played.away = False
    loads._known[KEY, False].ask_after = 0.0
    await loads.ask(KEY, world())
    assert loads.load(KEY, 15) is not None


async def test_a_stack_that_the_agent_does_not_know_is_a_counted_error(loads):
    with pytest.raises(LoadError, match="404 no such stack"):
        await loads.ask(("shop", "other"), world())
    assert 'packetstack_load_errors_total{reason="Refused"} 1.0' in exported(loads)


@pytest.mark.parametrize("body", [b"", b"{}", b"[" * 100_000, b'{"time": 1, "engines": "none"}', b"\xff" * 100])
async def test_nonsense_is_a_counted_error(body):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    loads = Loads(Metrics(), server.server_address[1])
    try:
        with pytest.raises(LoadError):
            await loads.ask(KEY, world())
        assert 'packetstack_load_errors_total{reason="Unreadable"} 1.0' in exported(loads)
    finally:
        await loads.close()
        server.shutdown()
        server.server_close()


async def test_an_answer_that_is_too_long_is_not_kept(loads, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(LoadError, match="is longer than 100 bytes"):
        await loads.ask(KEY, world())


@pytest.mark.parametrize("where", [world(address=None), world(node="node-1"), world(node=None)])
async def test_only_the_agent_of_the_stack_s_node_is_asked(loads, played, where):
    with pytest.raises(LoadError, match="no engine of the stack has a node"):
        await loads.ask(KEY, where)
    assert played.asked == []


async def test_what_was_known_of_another_node_is_forgotten(loads, played):
    for _ in range(2):
        await loads.ask(KEY, world())
    await loads.ask(KEY, world("127.0.0.1"))
    assert loads.load(KEY, 15) is not None
    with pytest.raises(LoadError):
        await loads.ask(KEY, world("127.0.0.2"))
    assert loads.load(KEY, 15) is None
    loads.forget(KEY)
    assert "packetstack_load_age_seconds{" not in exported(loads)
