"""How a message's content and role reach the chat template: one way for what is answered and what is trained on."""

from __future__ import annotations

from collections.abc import Iterable


def joined(texts: Iterable[str]) -> str:
    """The text parts of one message as the one text that templates take: each on a line of its own."""
    return "\n".join(texts)


def template_role(role: str) -> str:
    """The role under the name that templates know: `developer` is the newer one of `system`."""
    return "system" if role == "developer" else role
