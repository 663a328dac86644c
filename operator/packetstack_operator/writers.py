"""Who wrote `spec.replicas` and `spec.engine.cores`, by `managedFields`: what the autoscaler decides has one writer."""

from collections.abc import Collection

from packetstack_core import resources
from packetstack_core.autoscaling import rounds, together, vertical
from packetstack_core.autoscaling.together import Field
from packetstack_core.autoscaling.triggers import Size
from packetstack_operator.observing import Raw

MANAGER = "packetstack-autoscaler"
"""The autoscaler's own name as a writer."""
HPA = "kube-controller-manager"
PATHS: dict[Field, tuple[str, ...]] = {
    "cores": ("f:spec", "f:engine", "f:cores"),
    "replicas": ("f:spec", "f:replicas"),
}
"""What can have a second writer, as `managedFields` has it."""


def writers(stack: Raw, what: Field) -> list[str]:
    """Managers that own this field, the latest last. Writes of /scale have no time: they are the latest.

    Nobody owns a value from the default, if a server-side apply made the stack; nor one that /scale has put in its
    place then.
    """
    found = []
    for entry in stack["metadata"].get("managedFields") or ():
        fields = entry.get("fieldsV1") or {}
        for name in PATHS[what]:
            fields = fields.get(name) if isinstance(fields, dict) else None
        if fields is not None:
            found.append((entry.get("time") or "~", str(entry.get("manager") or "somebody")))
    return [manager for _, manager in sorted(found)]


def ours(stack: Raw) -> frozenset[Field]:
    """What the autoscaler owns."""
    return frozenset(what for what in PATHS if MANAGER in writers(stack, what))


def other_writer(
    stack: Raw, spec: resources.Spec, state: together.State, size: Size, *, owned: Collection[Field], first: bool
) -> tuple[Field, str] | None:
    """What somebody has taken from the autoscaler since its last round, and who; None if nobody has.

    `owned`: what the autoscaler owned in the last round. `first`: this is the first round of this process, so that what
    nobody owns may be the write of the process before.
    """
    if spec.autoscaling is None or spec.autoscaling.paused:
        return None
    changed = together.changed_by_other(spec, state, size)
    for what in _decided(spec, state):
        found = writers(stack, what)
        if MANAGER in found:
            continue
        if (what in owned or what in changed) if found else (what in changed and not first):
            who = found[-1] if found else "somebody"
            return what, f"{who} (a HorizontalPodAutoscaler)" if who == HPA else who
    return None


def _decided(spec: resources.Spec, state: together.State) -> tuple[Field, ...]:
    """What the autoscaler has not left to somebody else before."""
    wanted = spec.autoscaling
    if wanted is None:
        return ()
    found: list[Field] = []
    by_triggers = wanted.vertical is not None and not vertical.is_external(state.vertical)
    if by_triggers:
        found.append("cores")
    if by_triggers if wanted.vertical_decides_replicas else not rounds.is_external(state.horizontal):
        found.append("replicas")
    return tuple(found)
