"""Round numbers for the axes of a plot."""

from __future__ import annotations

import math


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10^low to 10^high: powers of ten, and multiples of them where those are few."""
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [d * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for d in digits]
        ticks = [v for v in ticks if low <= math.log10(v) <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 8)]
    return ticks or [10**low, 10**high]


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    min_step = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= min_step)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]
