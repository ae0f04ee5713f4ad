"""Wakes those who wait for news of one finetuning job. Belongs to one event loop."""

from __future__ import annotations

import asyncio


class JobSignals:
    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, job_id: str) -> None:
        for future in self._waiting.pop(job_id, ()):
            if not future.done():
                future.set_result(None)

    def ticket(self, job_id: str) -> asyncio.Future[None]:
        """A future that the next `notify` fulfils. Take it before looking at the job, so that no news is missed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, set()).add(future)
        return future

    def give_back(self, job_id: str, ticket: asyncio.Future[None]) -> None:
        """Stop waiting. Idempotent."""
        waiting = self._waiting.get(job_id)
        if waiting is not None:
            waiting.discard(ticket)
            if not waiting:
                del self._waiting[job_id]

    async def wait(self, job_id: str, ticket: asyncio.Future[None], seconds: float) -> bool:
        """True if news came within `seconds`. Uses up the ticket."""
        try:
            async with asyncio.timeout(seconds):
                await ticket
                return True
        except TimeoutError:
            return False
        finally:
            self.give_back(job_id, ticket)
