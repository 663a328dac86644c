"""All orders of steps of a model: breadth first, each state once, so the first way to what is wrong is a shortest one."""

from collections import deque
from typing import Any

from .mirror import ALL, Mirror
from .mirror_ends import NEWCOMER, Label, Setting, Wrong
from .mirror_engines import Rules


def walk(setting: Setting, rules: Rules = ALL, most: int = 10**9) -> int:
    """-> states seen, at most `most`. Raises Wrong; its message ends with the steps that led there."""
    first = Mirror(setting, rules)
    seen = {first.key()}
    todo: deque[tuple[Mirror, Any]] = deque([(first, None)])
    while todo and len(seen) < most:
        at, way = todo.popleft()
        progress = at.progress()
        try:
            if not progress:
                at.check_rest()
                check_openers(at)
        except Wrong as e:
            raise Wrong(f"{e}\n  {_steps(way)}") from None
        for label in at.enabled():
            new = at.copy()
            try:
                new.do(label)
            except Wrong as e:
                raise Wrong(f"{e}\n  {_steps((way, label))}") from None
            key = new.key()
            if key not in seen:
                seen.add(key)
                todo.append((new, (way, label)))
    return len(seen)


def settle(model: Mirror) -> None:
    """All goes on until nothing happens by itself. Raises Wrong."""
    for _ in range(1000):
        progress = model.progress()
        if not progress:
            model.check_rest()
            return
        model.do(progress[0])
    raise Wrong("it does not come to rest")


def check_openers(model: Mirror) -> None:
    """A client whose SYN was not answered asks again, and is heard. Raises Wrong."""
    if len(model.flows[NEWCOMER]) >= model.setting.room:
        return  # nobody new is heard
    for end in model.clients:
        if end.state != "S" or model._alive(end.conn, end.inc):
            continue
        new = model.copy()
        for _ in range(2):  # the first may only reset what the backend has of the connection before
            if new.clients[end.conn].state == "S":
                new.do(("send", "S", end.conn, 0))
                settle(new)
        if new.clients[end.conn].state != "E":
            raise Wrong(
                f"the client of connection {end.conn} asks again and is not heard: {new.list} {new.flows} {new.backends}"
            )


def _steps(way: Any) -> str:
    steps: list[Label] = []
    while way is not None:
        way, label = way
        steps.append(label)
    return "\n  ".join(" ".join(map(str, s)) for s in reversed(steps))
