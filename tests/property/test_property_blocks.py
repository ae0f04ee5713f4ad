"""Any order of admissions, growth, commits, releases and clearing keeps every block accounted for."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coserve.server.engine.kv_cache import OutOfBlocks
from coserve.server.engine.prefix_cache import BlockManager

SIZE = 3
BLOCKS = 14


class Blocks(RuleBasedStateMachine):
    """A model of the cache's content beside the manager: what each slot holds, by the whole history of its token."""

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(BLOCKS, SIZE)
        self.manager.prefix_cache.limit("a", 3)
        self.live = []  # (sequence, salt, version, tokens)
        self.content = [None] * (BLOCKS * SIZE)

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        salt=st.sampled_from("ab"), version=st.sampled_from(["", "v"]), expected=st.integers(0, 60),
    )  # fmt: skip
    def admit(self, tokens, salt, version, expected):
        sequence = self.manager.admit(tokens, salt, version, expected_tokens=expected, owner=salt)
        assert sequence.cached_tokens < len(tokens)
        for position, slot in enumerate(sequence.slots(0, sequence.cached_tokens)):
            assert self.content[slot] == (salt, version, tuple(tokens[: position + 1]))
        self.live.append((sequence, salt, version, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data, count):
        sequence, salt, version, tokens = data.draw(st.sampled_from(self.live))
        possible = self.manager.can_grow(sequence, count)
        before = list(sequence.blocks)
        try:
            self.manager.grow(sequence, count)
        except OutOfBlocks:
            assert not possible
            assert sequence.blocks == before
            return
        assert possible
        start = sequence.length
        while len(tokens) < start + count:
            tokens.append(len(tokens) % 2)
        for position, slot in enumerate(sequence.slots(start, start + count), start):
            self.content[slot] = (salt, version, tuple(tokens[: position + 1]))
        self.manager.commit(sequence, version, tokens[start : start + count])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from(self.live))
        self.live = [other for other in self.live if other is not entry]
        self.manager.release(entry[0])

    @rule(version=st.sampled_from([None, "", "v"]))
    def clear(self, version):
        self.manager.prefix_cache.clear(version)

    @invariant()
    def every_reference_is_accounted_for(self):
        self.manager.check(sequence for sequence, *_ in self.live)
        held = {block for sequence, *_ in self.live for block in sequence.blocks}
        assert self.manager.free_blocks == BLOCKS - len(held)

    @invariant()
    def an_owners_idle_blocks_stay_inside_its_limit(self):
        held = {block for sequence, *_ in self.live for block in sequence.blocks}
        cache = self.manager.prefix_cache
        assert sum(cache._owners.get(block) == "a" and block not in held for block in cache.blocks) <= 3

    @invariant()
    def running_sequences_keep_their_content(self):
        for sequence, salt, version, tokens in self.live:
            for position, slot in enumerate(sequence.slots(0, sequence.length)):
                assert self.content[slot] == (salt, version, tuple(tokens[: position + 1]))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
