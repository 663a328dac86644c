"""Engines get the build of the datapath that is installed now.

With the shard layout that they have, a fresh process follows in each: it goes on with the flows. A build of another layout
cannot read them, so the stack gets a second set of engines for it, which `packetstack_core.transitions` plans.
"""

import asyncio
import signal

from packetstack_agent import builds
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.journal import Journal
from packetstack_agent.keeping import Keeper
from packetstack_agent.managed import Managed
from packetstack_core import shards
from packetstack_core.assignment import State
from packetstack_core.reasons import EventReason
from packetstack_core.verbs import Json

UPGRADE_SECONDS = 10.0


async def upgrade_engine(managed: Managed, engine: Engine, journal: Journal) -> Json:
    """Let a datapath of the installed build follow the one that serves. AgentError, and that goes on, if it cannot."""
    slot, attachments = engine.slot, engine.attachments
    before = attachments.serving if attachments is not None else None
    if before is None or engine.init is None or attachments is None:
        raise AgentError(f"engine {slot}: no datapath is attached; wait until it is ready")
    name, old = managed.stack.name, before.pid
    build = builds.installed()
    installed, present = await asyncio.to_thread(builds.shard_of, build), engine.blueprint.shard
    if installed != present:
        raise AgentError(
            f"engine {slot}: LayoutMismatch: the installed build has shard layout {shards.number(installed)}, its set of "
            f"engines {shards.number(present)}; process {old} goes on; a second set takes over with: packetstack upgrade {name}"
        )
    await asyncio.to_thread(builds.renew, engine.blueprint.arena.parent, build)
    attachments.refused = ""
    engine.init.signal(signal.SIGHUP)
    await attachments.until(
        lambda: attachments.serving not in (None, before) or bool(attachments.refused), UPGRADE_SECONDS
    )
    if attachments.serving in (None, before):
        why = attachments.refused or f"no new datapath came within {UPGRADE_SECONDS:g} s"
        raise AgentError(f"engine {slot}: {why}; process {old} goes on; see packetstack logs {slot}")
    pause = attachments.pause_seconds * 1000
    message = f"engine {slot}: datapath {engine.pid} follows {old} after {pause:.2f} ms"
    journal.event(name, EventReason.ENGINE_UPGRADED, message)
    return {"slot": slot, "from": old, "to": engine.pid, "pauseMilliseconds": round(pause, 3)}


async def upgrade_stack(managed: Managed, keeper: Keeper, journal: Journal) -> Json:
    """Let all engines that take new connections have the installed build; see `packetstack_core.verbs.UPGRADE`."""
    stack, installed = managed.stack, await asyncio.to_thread(builds.shard_of, builds.installed())
    present = stack.shard
    keeper.serve_by(managed, installed)
    if installed != present:
        had, gets = shards.number(present), shards.number(installed)
        message = (
            f"the installed build has shard layout {gets}, the present engines have {had}: a second set of engines takes new "
            "connections, and the present one keeps its own until they have ended"
        )
        journal.event(stack.name, EventReason.ENGINE_UPGRADED, message)
        return {"from": had, "to": gets}
    engines = [e for e in managed.engines.values() if e.blueprint.set == stack.current and e.state is State.ACTIVE]
    return {"engines": [await upgrade_engine(managed, e, journal) for e in sorted(engines, key=lambda e: e.slot)]}
