"""How the agent's process will end: said by a request, by a signal, or by the flow tables of a cluster."""

import asyncio


class Ending:
    """Waited for by the process; said once."""

    def __init__(self) -> None:
        self.said = asyncio.Event()
        self.leaving = False
        """Nothing is removed: engines go on, and the next agent takes them over."""
        self.anew = False
        """The process begins again after its end, and ends the flows of another build."""

    def stop(self) -> None:
        """End, and remove all stacks."""
        self.said.set()

    def leave(self) -> None:
        """End, and let the stacks go on."""
        self.leaving = True
        self.said.set()

    def begin_anew(self) -> None:
        """End, and begin again without what another build has made."""
        self.anew = True
        self.leave()
