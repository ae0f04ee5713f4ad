"""Checks of uploaded adapter folders, on a thread of their own: parsing and hashing must not hold up tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from coserve.server.engine.cores import work_alone
from coserve.server.training.fault import fault_of
from coserve.server.training.peft.folder import AdapterError, read_folder, version_digest
from coserve.server.training.peft.sites import Site
from coserve.server.wire.messages import AdapterChecked, CheckAdapter

log = logging.getLogger("coserve.engine")


class FolderCheck:
    """Takes CheckAdapter messages, gives AdapterChecked ones."""

    def __init__(
        self, data_dir: Path, sites: Sequence[Site], base_digest: str, fits: Callable[[dict], str | None]
    ) -> None:
        self._data_dir, self._sites, self._base_digest, self._fits = data_dir, sites, base_digest, fits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="coserve-check", initializer=work_alone)
        self._waiting: list[Future[AdapterChecked]] = []

    def start(self, message: CheckAdapter) -> None:
        self._waiting.append(self._thread.submit(self._check, message))

    def finished(self) -> Iterable[AdapterChecked]:
        """Results since the last call."""
        done = [future for future in self._waiting if future.done()]
        self._waiting = [future for future in self._waiting if not future.done()]
        return [future.result() for future in done]

    def _check(self, message: CheckAdapter) -> AdapterChecked:
        """Whatever a folder makes of the reader, it is an answer."""
        try:
            return self._read(message)
        except Exception as error:
            log.exception("the folder %s could not be checked", message.path)
            return AdapterChecked(message.call_id, f"the adapter cannot be checked: {fault_of(error).message}", None)

    def _read(self, message: CheckAdapter) -> AdapterChecked:
        folder = self._data_dir / message.path
        try:
            config, weights = read_folder(folder, self._sites, self._base_digest)
        except AdapterError as error:
            return AdapterChecked(message.call_id, str(error), error.param)
        except OSError as error:
            return AdapterChecked(message.call_id, f"the adapter's files cannot be read: {error.strerror}", None)
        problem = self._fits(weights)
        if problem is not None:
            return AdapterChecked(message.call_id, problem, "file")
        return AdapterChecked(
            message.call_id, None, None,
            digest=version_digest(self._base_digest, config, weights),
            rank=max(pair.a.shape[0] for pair in weights.values()),
            bytes=sum(t.numel() * t.element_size() for pair in weights.values() for t in (pair.a, pair.b)),
            target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in weights})),
        )  # fmt: skip
