"""Numbers as in Go: integers that wrap, division towards zero, floats that saturate.

Where Go leaves a result to the processor (a float that does not fit int32), this is as on arm64: it saturates, so that
an absurdly high metric asks for many engines, not for none. `milli` values are thousandths, as `Quantity.MilliValue()`.
"""

from collections.abc import Callable
from decimal import Decimal
from math import ceil, inf, isnan, nan

from packetstack_core.values import quantity

_MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1


def int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def quotient(a: int, b: int) -> int:
    """Integer division towards zero; Python's rounds down."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def ratio_of(a: int, b: float) -> float:
    """Both sides are floats first: Python divides integers exactly, Go does not."""
    if b == 0:
        return inf if a > 0 else -inf if a < 0 else nan
    return float(a) / b


def _saturated(value: float, largest: int, rounding: Callable[[float], int]) -> int:
    if isnan(value):
        return 0
    return largest if value >= largest else -largest - 1 if value <= -largest - 1 else rounding(value)


def ceil32(value: float) -> int:
    return _saturated(value, _MAX_INT32, ceil)


def ceil64(value: float) -> int:
    return _saturated(value, MAX_INT64, ceil)


def approximate(value: Decimal) -> float:
    """`Quantity.AsApproximateFloat64`: the digits of the canonical form times its power of ten.

    So 18m is 18 * 0.001 = 0.018000000000000002.
    """
    for exponent in (0, -3, -6, -9):
        digits = value.scaleb(-exponent)
        if digits == digits.to_integral_value():
            break
    return float(ceil(digits)) * float(f"1e{exponent}")


def milli(text: str) -> int:
    """Thousandths of a Kubernetes quantity, rounded up as `MilliValue` does. Raises ValueError."""
    return ceil(quantity(text) * 1000)
