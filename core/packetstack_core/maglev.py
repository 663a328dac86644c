"""Maglev's lookup table: which backend a flow's hash goes to, with few changes when backends come and go.

After Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4;
weights as turns that a backend may take or miss.
"""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

PRIMES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
"""Table sizes: the largest primes below powers of two."""


def size_for(backends: int) -> int:
    """A table size with at least a hundred entries a backend, so that shares are true within about 1 %.

    Beyond 1,310 backends the largest size there is.
    """
    return next((p for p in PRIMES if p >= 100 * backends), PRIMES[-1])


def table(backends: Sequence[tuple[str, int]], size: int) -> list[int]:
    """The lookup table: `size` indexes into `backends`, which are (name, weight) pairs.

    A backend's share is its weight over the sum of all, within one entry or 1 %. It depends on names and weights only,
    not on the order of `backends`, so all engines agree. Weight 0 gets no entry; without any positive weight
    the table is empty. `size` must be a prime that is larger than the number of backends: see `size_for`.
    Raises ValueError for repeated names, negative weights or a size that is not a prime.
    """
    if size not in PRIMES and (size < 2 or any(size % d == 0 for d in range(2, int(size**0.5) + 1))):
        raise ValueError(f"size: {size} is not a prime; use size_for()")
    if len({name for name, _ in backends}) != len(backends):
        raise ValueError("backends: a name occurs twice; use each name once")
    if any(weight < 0 for _, weight in backends):
        raise ValueError("backends: a weight is negative; use 0 or more")
    # By name, so that the order in which backends are listed changes nothing.
    order = sorted((i for i, (_, weight) in enumerate(backends) if weight > 0), key=lambda i: backends[i][0])
    if not order:
        return []
    if len(order) >= size:
        raise ValueError(f"size: {size} is too small for {len(order)} backends; use size_for()")

    step, at, credit = [], [], []
    for i in order:
        digest = blake2b(backends[i][0].encode(), digest_size=16).digest()
        at.append(int.from_bytes(digest[:8], "little") % size)
        step.append(int.from_bytes(digest[8:], "little") % (size - 1) + 1)
        credit.append(0)
    most = max(backends[i][1] for i in order)
    gain = [backends[i][1] for i in order]
    entries = [-1] * size
    filled = 0
    while True:
        for k, i in enumerate(order):
            # A backend of half the largest weight takes every second turn.
            credit[k] += gain[k]
            if credit[k] < most:
                continue
            credit[k] -= most
            position, stride = at[k], step[k]
            while entries[position] >= 0:
                position += stride
                if position >= size:
                    position -= size
            entries[position] = i
            at[k] = position
            filled += 1
            if filled == size:
                return entries


def rising(whole: Sequence[int], steady: Sequence[int], parts: Sequence[int]) -> list[int]:
    """The table while some backends rise to their share: `parts[i]` of the largest of `parts` is what i has of its own.

    `whole`: the table of all backends, `steady`: that without those which rise, by the same indexes and of the same size.
    A backend that rises has its part of the entries that it will have, the others are as in `steady`. So a step of it
    moves only the entries that it gets, and both tables can be kept.
    """
    most = max(parts, default=1)
    share = Counter(whole)
    left = {i: -(-share[i] * part // most) for i, part in enumerate(parts) if part < most}
    entries = list(whole)
    for entry, i in enumerate(whole):
        if i in left:
            if left[i]:
                left[i] -= 1
            else:
                entries[entry] = steady[entry]
    return entries
