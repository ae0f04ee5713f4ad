"""Looks at the server once a second while the show runs, and keeps the live table and the evidence up to date."""

from __future__ import annotations

import asyncio
import time

from coserve.server.demo.client import Client
from coserve.server.demo.finetuning import Progress
from coserve.server.demo.meter import Rates, Sample, percentile, read_metrics
from coserve.server.demo.proof import POLL_RECORDS, IterationRecords
from coserve.server.demo.streams import Streams
from coserve.server.demo.table import LiveTable, Picture

_EVERY_SECONDS = 1.0
_RECORDS_EVERY = 15  # looks
_GAP_WINDOW = 30.0


class Watch:
    """Use it in `async with`: it looks until then. `stage` and `progress` are set by whoever runs the show."""

    def __init__(self, admin: Client, streams: Streams, table: LiveTable, records: IterationRecords) -> None:
        self._admin, self._streams, self._table, self._records = admin, streams, table, records
        self._rates = Rates()
        self._task: asyncio.Task[None] | None = None
        self.stage = ""
        self.progress: Progress | None = None

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._keep_looking())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def sample(self) -> Sample:
        """Read the counters now. Raises CallFailed."""
        sample = read_metrics(await self._admin.text("/metrics"), time.monotonic())
        self._rates.add(sample)
        return sample

    async def read_records(self, limit: int = POLL_RECORDS) -> None:
        """Fetch the newest iteration records now. Raises CallFailed."""
        self._records.add((await self._admin.get("/v1/coserve/iterations", limit=limit))["data"])

    def check(self) -> None:
        """Raises what ended the looking, if something did."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def _keep_looking(self) -> None:
        looks = 0
        while True:
            sample = await self.sample()
            looks += 1
            if looks % _RECORDS_EVERY == 0:
                await self.read_records()
            self._table.show(self._picture(sample), sample.at)
            await asyncio.sleep(_EVERY_SECONDS)

    def _picture(self, sample: Sample) -> Picture:
        gaps = self._streams.gaps.since(sample.at - _GAP_WINDOW)
        progress = self.progress
        return Picture(
            stage=self.stage,
            rates=self._rates.by_kind(),
            p50=percentile(gaps, 0.50),
            p99=percentile(gaps, 0.99),
            promise=sample.promise,
            step=progress.step if progress else None,
            total_steps=progress.total_steps if progress else None,
            loss=progress.loss if progress else None,
            eta=progress.eta if progress else None,
            finished_streams=self._streams.finished,
            failed_streams=len(self._streams.failures),
            words=self._streams.latest,
        )
