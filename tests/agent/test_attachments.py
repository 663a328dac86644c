"""Who may serve an engine's queues: never two processes. Datapath processes are played over real sockets."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.model.node import turns

from packetstack_agent import attachments, builds
from packetstack_agent.attachments import Attachments, Link, Shared
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import constant, ffi
from packetstack_core import shards

SIZE = ffi.sizeof("struct ps_message")


class Datapath:
    """A process's half of the conversation. It dies when its connection is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    async def hello(self, generation: int = 0, shard: str = "") -> None:
        await asyncio.get_running_loop().sock_connect(self.socket, str(self.path))
        self.send("PS_MSG_HELLO", generation, shard)

    def send(self, kind: str, generation: int = 0, shard: str = "") -> None:
        message = ffi.new("struct ps_message *")
        if shard:
            message.shard = builds.form_of(shard)[0]
        message.kind, message.layout = constant(kind), constant("PS_LAYOUT_VERSION")
        message.generation = generation
        self.socket.send(bytes(ffi.buffer(message)))

    async def got(self) -> int:
        """The kind of the next message, 0 at the end of the connection."""
        async with asyncio.timeout(5):
            data = await asyncio.get_running_loop().sock_recv(self.socket, SIZE)
        message = ffi.new("struct ps_message *")
        ffi.memmove(message, data, len(data))
        return int(message.kind)

    async def prepare(self) -> None:
        """Up to where it waits to be let in."""
        await self.hello()
        assert await self.got() == constant("PS_MSG_ATTACH")
        self.send("PS_MSG_PREPARED")

    async def let_in(self) -> None:
        assert await self.got() == constant("PS_MSG_GO")

    async def waits(self) -> bool:
        """Whether nobody lets it in for a while."""
        try:
            async with asyncio.timeout(0.2):
                return not await asyncio.get_running_loop().sock_recv(self.socket, SIZE)
        except TimeoutError:
            return True

    def die(self) -> None:
        self.socket.close()


class Place:
    """An engine's socket, and what was reported of who serves it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "engine.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(str(self.path))
        listener.listen(8)
        self.listener = listener
        self.file = os.open("/dev/null", os.O_RDWR)
        self.view = ffi.new("struct ps_engine *")
        self.said: list[str] = []
        file = self.file
        shared = Shared(1, 1, (), (file,) * 5, [file] * 4, 1, self.view, shards.FIRST)
        self.attachments = Attachments(listener, shared, self.said.append)
        self.made: list[Datapath] = []

    def datapath(self) -> Datapath:
        self.made.append(Datapath(self.path))
        return self.made[-1]

    async def serving(self) -> Datapath:
        """A process that serves."""
        one = self.datapath()
        await one.prepare()
        await one.let_in()
        one.send("PS_MSG_READY")
        assert await self.attachments.until(lambda: self.attachments.serving is not None, 5)
        return one


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr(attachments, "STOP_SECONDS", 0.05)
    monkeypatch.setattr(attachments, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(Link, "kill", lambda _: None)  # they are this process, and live as long as the test says
    made = Place(tmp_path)
    yield made
    await made.attachments.close()
    for one in made.made:
        one.die()
    made.listener.close()
    os.close(made.file)


async def test_a_successor_is_let_in_when_the_one_before_it_has_stopped(place: Place) -> None:
    first, second = await place.serving(), place.datapath()
    await second.prepare()
    assert await first.got() == constant("PS_MSG_STOP")
    first.send("PS_MSG_STOPPED")
    await second.let_in()
    second.send("PS_MSG_READY")
    assert await place.attachments.until(lambda: place.said[-1] == "ready" and len(place.said) == 2, 5)
    assert place.view.generation == 2


async def test_a_build_of_another_shard_layout_is_not_let_in_and_said_until_one_of_the_sets_own_serves(
    place: Place,
) -> None:
    other = shards.FIRST.replace("1.", "7.", 1)
    for generation in (0, 3):
        stranger = place.datapath()
        await stranger.hello(generation, other)
        assert await stranger.got() == constant("PS_MSG_REFUSED")
        assert place.attachments.foreign == other
        assert place.attachments.refused == "LayoutMismatch: datapath has shard layout 7, its set of engines 1"
        stranger.die()
    one = place.datapath()
    await one.hello(0, shards.FIRST)
    assert await one.got() == constant("PS_MSG_ATTACH")
    one.send("PS_MSG_PREPARED")
    await one.let_in()
    one.send("PS_MSG_READY")
    assert await place.attachments.until(lambda: place.attachments.serving is not None, 5)
    assert place.attachments.foreign == ""


async def test_no_successor_is_let_in_while_the_one_before_it_may_live(place: Place) -> None:
    first, second = await place.serving(), place.datapath()
    await second.prepare()  # the first one neither stops nor dies of being killed
    assert await second.got() == 0, "it is sent away"
    third = place.datapath()
    await third.prepare()
    assert await third.waits()
    assert any("has not ended" in what for what in place.said)
    assert place.view.generation == 1
    first.die()
    await third.let_in()


async def test_one_that_was_let_in_and_does_not_get_ready_must_die_before_the_next_one(place: Place) -> None:
    first, second = place.datapath(), place.datapath()
    await first.prepare()
    await first.let_in()  # and hangs: it may touch the queues when it wakes up
    await second.prepare()
    assert await second.waits()
    first.die()
    await second.let_in()


async def test_one_whose_message_makes_no_sense_still_serves(place: Place) -> None:
    first = await place.serving()
    first.socket.send(b"?")
    second = place.datapath()
    await second.prepare()
    assert await first.got() == constant("PS_MSG_STOP")
    assert place.view.generation == 1
    first.send("PS_MSG_STOPPED")
    await second.let_in()


async def test_nobody_is_let_in_after_the_end(place: Place) -> None:
    first, second = await place.serving(), place.datapath()
    await second.prepare()
    ending = asyncio.create_task(place.attachments.end())
    await turns()
    first.die()
    await ending
    assert await second.waits()
    assert place.attachments.serving is None


async def test_an_end_that_does_not_come_is_an_error(place: Place) -> None:
    await place.serving()
    with pytest.raises(AgentError, match="has not ended"):
        await place.attachments.end()


async def test_a_supervisor_gets_what_it_may_read_and_ends_nothing(place: Place) -> None:
    serving, supervisor = await place.serving(), place.datapath()
    await asyncio.get_running_loop().sock_connect(supervisor.socket, str(place.path))
    supervisor.send("PS_MSG_LOOK")
    await turns()
    await asyncio.sleep(0.01)
    data, fds, _, _ = socket.recv_fds(supervisor.socket, SIZE, 8)
    message = ffi.new("struct ps_message *")
    ffi.memmove(message, data, SIZE)
    assert message.kind == constant("PS_MSG_VIEW")
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)
    assert await serving.waits()
    assert place.said == ["ready"]


async def test_one_that_serves_and_never_stops_talking_is_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    serving, killed = await place.serving(), asyncio.Event()
    monkeypatch.setattr(Link, "kill", lambda _: killed.set())
    for _ in range(attachments.MOST_MESSAGES):
        serving.send("PS_MSG_READY")
    await asyncio.sleep(0.05)
    assert not killed.is_set()
    serving.send("PS_MSG_READY")
    async with asyncio.timeout(5):
        await killed.wait()


async def test_strangers_get_no_more_than_a_few_answers_at_once(place: Place) -> None:
    """Each is an event, and work: without a pause one process would keep the agent from all else."""
    loop = asyncio.get_running_loop()
    made = [place.datapath() for _ in range(3 * attachments.CONVERSATIONS)]
    for one in made:
        try:
            await loop.sock_connect(one.socket, str(place.path))
            one.send("PS_MSG_READY")
        except OSError:
            break
    await asyncio.sleep(attachments.REFUSED_SECONDS / 2)
    assert len(place.said) <= attachments.CONVERSATIONS
