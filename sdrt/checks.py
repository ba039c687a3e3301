"""Checks of single values that callers pass, each with the value and what would do."""

import math
import numbers
import reprlib

from sdrt.errors import RequestError

LARGEST_FLOAT32 = 3.4028234663852886e38


def check_whole(name: str, value: object, minimum: int, maximum: int) -> int:
    """A whole number from `minimum` to `maximum`. Raises RequestError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} is {shown(value)}, not a whole number", hint=f"give {minimum} to {maximum}")
    number = int(value)
    if not minimum <= number <= maximum:
        raise RequestError(f"{name} is {shown(number)}", hint=f"give a whole number from {minimum} to {maximum}")
    return number


def check_share(name: str, value: object, *, hint: str) -> float:
    """A number from 0 to 1. Raises RequestError."""
    number = check_finite(name, value)
    if not 0 <= number <= 1:
        raise RequestError(f"{name} is {number:g}", hint=hint)
    return number


def check_finite(name: str, value: object) -> float:
    """A number that is finite in float32, in which the engines compute. Raises RequestError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} is {shown(value)}, not a number", hint="give a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST_FLOAT32:  # NaN compares false
        raise RequestError(f"{name} is {shown(value)}", hint="give a finite number")
    return number


def check_flag(name: str, value: object) -> bool:
    """True or False. Raises RequestError."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}", hint="give True or False")
    return value


def shown(value: object) -> str:
    """A value for a message, cut short."""
    # Python refuses to write out integers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
