"""What the API server has, before the watches bring it: our own latest writes laid over what they have brought."""

from collections.abc import Callable, Iterable

from packetstack_operator import pods
from packetstack_operator.observing import Raw
from packetstack_operator.ports import Key

REMEMBER_SECONDS = 10.0
"""How long a watch may lag behind our own writes."""

ANSWER_SECONDS = 60.0
"""How long the answer to a write may come after the watch has brought the object's deletion: longer than any request."""

At = tuple[str, str, str]
"""Kind, namespace and name of an object."""


class Overlay:
    """Answers to our writes, until the watch brings the same or something newer. `clock`: in seconds, only forward."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: dict[At, tuple[Raw, float]] = {}
        """What we wrote last, and when."""
        self._deleted: dict[At, tuple[int, float]] = {}
        """Resource versions of deletions that the watch has brought, and when; the oldest first."""
        self._missing: dict[At, str] = {}
        """UIDs of objects that the API server does not have, though no watch has brought their deletion."""

    def saw(self, at: At, type_: str | None, body: Raw) -> None:
        """A watch has brought an event of this type."""
        self._missing.pop(at, None)
        known = self._recent.get(at)
        if known is not None and (type_ == "DELETED" or version(body) >= version(known[0])):
            del self._recent[at]
        if type_ == "DELETED":
            now = self._clock()
            self._deleted.pop(at, None)
            self._deleted[at] = (version(body), now)
            while (first := next(iter(self._deleted))) and now > self._deleted[first][1] + ANSWER_SECONDS:
                del self._deleted[first]

    def wrote(self, at: At, answer: Raw) -> None:
        """The API server has answered a write with the object as it was then."""
        deleted = self._deleted.get(at)
        if deleted is None or version(answer) > deleted[0]:  # else the watch was faster than the answer
            self._recent[at] = (answer, self._clock())

    def missed(self, at: At, uid: str) -> None:
        """The API server says that it has no such object (any more)."""
        self._missing[at] = uid

    def latest(self, kind: str, key: Key, found: Iterable[Raw]) -> list[Raw]:
        """The stack's objects of this kind, by name: those that the watch has brought, or our own later writes."""
        objects = {str(o["metadata"]["name"]): o for o in found}
        for name, raw in list(objects.items()):
            if self._missing and self._missing.get((kind, key[0], name)) == raw["metadata"].get("uid"):
                del objects[name]
        now = self._clock()
        for at, (written, when) in list(self._recent.items()):
            if now > when + REMEMBER_SECONDS:
                del self._recent[at]
            elif at[:2] == (kind, key[0]) and _stack_of(written) == key[1]:
                present = objects.get(at[2])
                if present is None or version(written) > version(present):
                    objects[at[2]] = written
        return [o for _, o in sorted(objects.items())]


def version(raw: Raw) -> int:
    """The object's resource version; 0 for one that has none."""
    text = str(raw["metadata"].get("resourceVersion") or "0")
    return int(text) if text.isdigit() else 0


def _stack_of(raw: Raw) -> str:
    if raw.get("kind") in ("FlowTable", "PacketStack"):
        return str(raw["metadata"]["name"])
    return str(raw["metadata"].get("labels", {}).get(pods.STACK, ""))
