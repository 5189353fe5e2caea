"""Numbers with unit suffixes: `1M`, `16GB`."""

from __future__ import annotations

from peftzoo.errors import UserError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "kb": 1e3, "mb": 1e6, "gb": 1e9,
         "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def amount(option: str, text: str) -> int:
    """Convert `1M`, `16GB` or `300000` to a number; sizes are in bytes.

    Raises `UserError`, which names `option`, for any other text, for negative numbers and from 2**62 on.
    """
    number = text.strip().lower().rstrip("bgiktm")
    unit = text.strip().lower()[len(number) :]
    try:
        value = float(number) * UNITS[unit]
        if not 0 <= value < 2**62:
            raise ValueError
    except (ValueError, KeyError):
        raise UserError(f'{option} "{text}": a number, with K, M, G, GB or GiB, such as 1M or 16GB') from None
    return int(value)


def parse_pack_size(option: str, text: str) -> tuple[int | None, int | None]:
    """The size of a pack as (runs, None) for a number, (None, bytes) for 16GB, (None, None) for `auto`.

    With `auto`, the free memory decides. Raises `UserError`, which names `option`, for any other text.
    """
    if text == "auto":
        return None, None
    if text.isdecimal() and 0 < int(text) < 2**31:
        return int(text), None
    if text[-1:].upper() == "B" and (memory_budget := amount(option, text)):
        return None, memory_budget
    raise UserError(f'{option} "{text}": a number of runs from 1 on, auto, or a size of memory such as 16GB')
