"""Work that blocks, beside the event loop."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def to_the_end(work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` in a worker thread; a caller that is cancelled meanwhile waits for its end, so locks it holds stay true."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
