"""A job's files on their way from what the tenant uploaded to what the engine trains from.

Tokenizing runs in a thread and can be stopped; the spec is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve.server.data.dataset import DatasetReport, prepare_dataset
from coserve.server.data.formats import RowEncoder
from coserve.server.data.tokenizer import Tokenizer
from coserve.server.gateway.adapter_folders import FOLDER_FILES
from coserve.server.gateway.file_service import FileService
from coserve.server.gateway.job_spec import engine_spec, total_steps
from coserve.server.store.atomic import sync_folder, write_atomic
from coserve.server.store.datadir import DataDirectory
from coserve.server.store.jobs import Job
from coserve.server.store.store import Store
from coserve.server.wire.messages import EngineReady


class PreparationFailed(Exception):
    """The job cannot be trained as it is; the three fields are the job's `error`."""

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class Prepared:
    spec: dict[str, Any]
    total_steps: int
    warnings: tuple[str, ...]


class Preparer:
    """One job is tokenized at a time: generation shares the same cores."""

    def __init__(self, store: Store, data: DataDirectory, files: FileService, tokenizer: Tokenizer) -> None:
        self._store = store
        self._data = data
        self._files = files
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare-job")

    async def prepare(self, job: Job, engine: EngineReady, cancelled: threading.Event) -> Prepared:
        """Write jobs/<id>/ anew. Raises PreparationFailed, and Stopped once `cancelled` is set."""
        unknown = unknown_targets(job.adapter, engine)
        if unknown:
            raise PreparationFailed(
                "invalid_target_modules", targets_message(unknown, engine), "adapter.target_modules"
            )
        sources = [("training_file", job.training_file, "train")]
        if job.validation_file is not None:
            sources.append(("validation_file", job.validation_file, "valid"))
        paths = [(param, await self._source(job, param, file_id), part) for param, file_id, part in sources]
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._write, job, engine, paths, cancelled)

    def discard(self, job_id: str) -> None:
        """Remove what was prepared: nobody will train from it any more. Repeats harmlessly. Blocks."""
        for name in ("tokens", "init"):
            shutil.rmtree(self._data.job(job_id) / name, ignore_errors=True)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _source(self, job: Job, param: str, file_id: str) -> Path:
        file = await self._store.files.get(job.tenant, file_id)
        if file is None:
            raise PreparationFailed(f"invalid_{param}", f"The file {file_id} was deleted before it was read.", param)
        return self._files.path(file)

    def _write(
        self, job: Job, engine: EngineReady, sources: list[tuple[str, Path, str]],
        cancelled: threading.Event,
    ) -> Prepared:  # fmt: skip
        folder = self._data.job(job.id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.discard(job.id)
        reports = {param: self._tokens(job, engine, param, path, part, cancelled) for param, path, part in sources}
        init = self._copy_init(job, folder / "init")
        spec = engine_spec(job, engine.base_digest, has_validation=job.validation_file is not None, init=init)
        write_atomic(folder / "spec.json", json.dumps(spec, allow_nan=False).encode())
        sync_folder(folder.parent)
        warnings = [
            f"{report.cut_rows} of {report.rows} examples of the {param.replace('_', ' ')} are longer than "
            f"{job.training['max_length']} tokens and were cut"
            for param, report in reports.items()
            if report.cut_rows
        ]
        steps = total_steps(reports["training_file"].rows, job.hyperparameters, job.training)
        return Prepared(spec, steps, tuple(warnings))

    def _copy_init(self, job: Job, folder: Path) -> str | None:
        """The job's own copy of the adapter that it starts from, which may be deleted from now on."""
        path = job.adapter.get("init_path")
        if path is None:
            return None
        folder.mkdir(mode=0o700)
        try:
            for name in FOLDER_FILES:
                shutil.copyfile(self._data.resolve(path) / name, folder / name, follow_symlinks=False)
        except FileNotFoundError:
            raise PreparationFailed(
                "adapter_not_found", "The adapter to start from was deleted before the job began.", "adapter.init"
            ) from None
        return self._data.relative(folder)

    def _tokens(
        self, job: Job, engine: EngineReady, param: str, source: Path, part: str, cancelled: threading.Event
    ) -> DatasetReport:
        encoder = RowEncoder(self._tokenizer, engine.vocab_size, job.training["loss_on"])
        try:
            report = prepare_dataset(
                source, self._data.job(job.id) / "tokens" / f"{part}.safetensors", encoder,
                max_model_len=engine.max_model_len, max_length=job.training["max_length"], scratch=self._data.tmp,
                should_stop=cancelled.is_set,
            )  # fmt: skip
        except FileNotFoundError:
            raise PreparationFailed(f"invalid_{param}", "The file was deleted before it was read.", param) from None
        if not report.ok:
            raise PreparationFailed(f"invalid_{param}", report.error_message(), param)
        return report


def unknown_targets(adapter: Mapping[str, Any], engine: EngineReady) -> list[str]:
    """Names among a fresh adapter's target modules that are no modules of the base model."""
    names = adapter["target_modules"]
    if isinstance(names, str) or "init_path" in adapter:  # the engine checked the adapter that is gone on from
        return []
    return sorted(set(names) - set(engine.lora_sites))


def targets_message(unknown: list[str], engine: EngineReady) -> str:
    names = ", ".join(repr(name[:80]) for name in unknown[:5])
    return f"The base model has no module {names}; it has {', '.join(sorted(engine.lora_sites))}."
