"""Matches module names against regular expressions that a tenant wrote, in bounded time.

Python's own matcher backtracks and can be made to run for years; this one follows sets of positions through
the parsed expression and counts its work. It answers exactly what `re.fullmatch(...) is not None` answers,
and refuses what it cannot follow (back references, look-behind, possessive and conditional groups, flags).
"""

from __future__ import annotations

import re
import re._constants as op  # type: ignore[import-not-found]  # the standard library's own parse tree
import re._parser as sre  # type: ignore[import-not-found]
from collections.abc import Iterable
from typing import Any

MAX_PATTERN_CHARACTERS = 4096
MAX_WORK = 1_000_000  # node visits over all names; under a second

_CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Work:
    """What is left of one config's allowance of node visits; all of its expressions share it."""

    def __init__(self, visits: int = MAX_WORK) -> None:
        self.left = visits


class PatternError(ValueError):
    """The expression is malformed, uses something unsupported, or is too expensive."""


class Pattern:
    """One expression; `matches(name)` is true when the whole name matches.

    Raises PatternError on construction (syntax, features) or from `matches` (work limit).
    """

    def __init__(self, expression: str, work: Work | None = None) -> None:
        if len(expression) > MAX_PATTERN_CHARACTERS:
            raise PatternError(f"the expression has {len(expression)} characters; at most {MAX_PATTERN_CHARACTERS}")
        try:
            parsed = sre.parse(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"not a regular expression: {error}") from error
        if parsed.state.flags & ~re.UNICODE.value:
            raise PatternError("inline flags such as (?i) are not supported")
        self._nodes = list(parsed)
        self._work = work or Work()
        self._check(self._nodes)

    def matches(self, name: str) -> bool:
        try:
            return len(name) in self._follow(self._nodes, name, frozenset([0]))
        except RecursionError as error:
            raise PatternError("the expression is nested too deeply") from error

    def _check(self, nodes: Iterable[tuple[Any, Any]], depth: int = 0) -> None:
        """Refuse unsupported features at once, so that the answer does not depend on the names."""
        if depth > 100:
            raise PatternError("the expression is nested too deeply")
        for code, argument in nodes:
            if code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT):
                if code is op.AT and argument not in (op.AT_BEGINNING, op.AT_END, op.AT_BEGINNING_STRING,
                                                      op.AT_END_STRING):  # fmt: skip
                    raise PatternError("word boundaries (\\b, \\B) are not supported")
            elif code in (op.MAX_REPEAT, op.MIN_REPEAT):
                self._check(argument[2], depth + 1)
            elif code is op.SUBPATTERN:
                if argument[1] or argument[2]:
                    raise PatternError("inline flags such as (?i:…) are not supported")
                self._check(argument[3], depth + 1)
            elif code is op.BRANCH:
                for branch in argument[1]:
                    self._check(branch, depth + 1)
            elif code in (op.ASSERT, op.ASSERT_NOT):
                if argument[0] != 1:
                    raise PatternError("look-behind is not supported")
                self._check(argument[1], depth + 1)
            else:
                raise PatternError(f"{str(code).lower()} is not supported in module name expressions")

    def _follow(self, nodes: Iterable[tuple[Any, Any]], name: str, starts: frozenset[int]) -> frozenset[int]:
        """Where the nodes, one after the other, can end when they begin at any of `starts`."""
        for code, argument in nodes:
            self._work.left -= 1 + len(starts)
            if self._work.left < 0:
                raise PatternError("the expression takes too long to match; simplify it or list the module names")
            if not starts:
                return starts
            starts = self._step(code, argument, name, starts)
        return starts

    def _step(self, code: Any, argument: Any, name: str, starts: frozenset[int]) -> frozenset[int]:
        if code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return frozenset(p + 1 for p in starts if p < len(name) and _accepts(code, argument, name[p]))
        if code is op.AT:
            place = 0 if argument in (op.AT_BEGINNING, op.AT_BEGINNING_STRING) else len(name)
            return starts & {place}
        if code is op.SUBPATTERN:
            return self._follow(argument[3], name, starts)
        if code is op.BRANCH:
            return frozenset().union(*(self._follow(branch, name, starts) for branch in argument[1]))
        if code in (op.ASSERT, op.ASSERT_NOT):
            wanted = code is op.ASSERT
            return frozenset(p for p in starts if bool(self._follow(argument[1], name, frozenset([p]))) == wanted)
        least, most, body = argument
        return self._repeat(body, name, starts, int(least), None if most is op.MAXREPEAT else int(most))

    def _repeat(
        self, body: Iterable[tuple[Any, Any]], name: str, starts: frozenset[int], least: int, most: int | None
    ) -> frozenset[int]:
        reached = starts
        for _ in range(least):
            after = self._follow(body, name, reached)
            if after == reached:  # a fixed point: more rounds change nothing
                break
            reached = after
        ends = frontier = reached
        rounds = least
        while frontier and (most is None or rounds < most):
            frontier = self._follow(body, name, frontier) - ends
            ends |= frontier
            rounds += 1
        return ends


def _accepts(code: Any, argument: Any, character: str) -> bool:
    if code is op.ANY:
        return character != "\n"
    if code is op.LITERAL:
        return ord(character) == argument
    if code is op.NOT_LITERAL:
        return ord(character) != argument
    negate = bool(argument) and argument[0][0] is op.NEGATE
    return any(_in_class(kind, value, character) for kind, value in argument if kind is not op.NEGATE) != negate


def _in_class(kind: Any, value: Any, character: str) -> bool:
    if kind is op.LITERAL:
        return ord(character) == value
    if kind is op.RANGE:
        return value[0] <= ord(character) <= value[1]
    return _CATEGORIES[value](character)


def suffix_pattern(key: str, work: Work) -> Pattern:
    """What PEFT means by a key of rank_pattern or alpha_pattern: the expression, after any dotted prefix."""
    Pattern(key)  # the key alone must be a whole expression: "a)|(b" is not
    return Pattern(rf"(.*\.)?({key})", work)
