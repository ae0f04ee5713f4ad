"""How much of something fits in so many seconds, in a few questions about what it takes.

It may assume that more never takes less, and nearly a straight line more. It knows nothing of what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable


def largest(most: int, budget: float, seconds: Callable[[int], float]) -> int:
    """The largest size up to `most` whose `seconds` are within `budget`; 0 if 1 is not. They must not fall with the
    size; they are nearly straight lines, so the search guesses along the chord and halves only where that is slow."""
    above = seconds(most)
    if above <= budget:
        return most
    below = seconds(1)
    if below > budget:
        return 0
    low, high = 1, most  # low fits, high does not
    halve = False
    while high - low > 1:
        guess = (low + high) // 2 if halve else low + int((high - low) * (budget - below) / (above - below))
        guess = min(max(guess, low + 1), high - 1)
        found, width = seconds(guess), high - low
        if found <= budget:
            low, below = guess, found
        else:
            high, above = guess, found
        halve = 2 * (high - low) > width
    return low


def how_many(todo: int, left: float, seconds: Callable[[int], float]) -> int:
    """How many of `todo` layers or sub-steps fit in `left` seconds; 0 if not even one does. `seconds(n)` of n of them
    must not fall with n."""
    one = seconds(1)
    if one > left:
        return 0
    if todo == 1:
        return 1
    every = seconds(todo)
    if every <= left:
        return todo
    # Nearly a straight line (an upper estimate is a linear mean plus a norm): a few steps from the chord, if any.
    found = max(1, min(todo - 1, 1 + int((left - one) / ((every - one) / (todo - 1)))))
    while found > 1 and seconds(found) > left:
        found -= 1
    while found < todo - 1 and seconds(found + 1) <= left:
        found += 1
    return found
