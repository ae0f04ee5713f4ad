"""A row of a data set as the engine trains on it."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # a label that bears no loss


@dataclass(frozen=True, slots=True)
class TokenRow:
    ids: list[int]
    labels: list[int]  # one an id: the id itself, or IGNORED

    @property
    def loss_tokens(self) -> int:
        """Labels that count; the first token of a row has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int) -> TokenRow:
        return TokenRow(self.ids[:length], self.labels[:length])
