"""Opens what a job consists of: its order, rows, events, checkpoints, and weights to begin or go on with.

Files may be missing, damaged or from another base model; the answer is then a JobError with a code, never half a job.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from coserve.server.training.batches import BatchSource
from coserve.server.training.checkpoint import CheckpointError, CheckpointStore
from coserve.server.training.dataset import DatasetError, TokenRows
from coserve.server.training.durable import is_storage_full
from coserve.server.training.events import EventLog, Record
from coserve.server.training.fault import fault_of
from coserve.server.training.peft.folder import AdapterError, read_folder
from coserve.server.training.peft.lora import LoraConfig, LoraWeights, cast_weights, init_lora
from coserve.server.training.peft.patterns import PatternError
from coserve.server.training.peft.sites import Site
from coserve.server.training.progress import Progress
from coserve.server.training.records import OnEvent
from coserve.server.training.spec import MAX_SPEC_BYTES, JobSpec, SpecError, parse_spec

log = logging.getLogger("coserve.training")

NO_ROOM = "Fine-tuning job paused: there is no room left on the disk"
TERMINAL = ("finished", "failed", "cancelled")


class JobError(Exception):
    """The job cannot run; `code` is an error code of the HTTP API."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class JobOver(Exception):
    """The job's events say that it has ended: there is nothing to run. `state` says how."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the job is {state}")
        self.state = state


@dataclass(frozen=True, slots=True)
class Opened:
    spec: JobSpec
    source: BatchSource
    log: EventLog
    store: CheckpointStore
    config: LoraConfig
    params: LoraWeights  # masters, on the device
    optimizer: dict[str, torch.Tensor]  # empty at the beginning
    progress: Progress
    announced: frozenset[int]  # steps whose checkpoint event stands and was not taken back
    published: frozenset[int]
    dropped: dict[int, str]  # damaged checkpoints that were removed: step -> why


def open_parts(
    data_dir: Path,
    job_id: str,
    sites: Sequence[Site],
    base_digest: str,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    vocab_size: int | None,
) -> Opened:
    """Raises JobError, JobOver; OSError when the disk itself fails."""
    folder = data_dir / "jobs" / job_id
    if not folder.is_dir():
        raise JobError("job_not_found", f"There is no folder for job {job_id}.")
    log = EventLog(folder / "events.jsonl")
    try:
        if log.last is not None and log.last["kind"] in TERMINAL:
            raise JobOver(log.last["kind"])
        spec, source = _read_order(folder, job_id, base_digest, vocab_size)
        store = CheckpointStore(folder / "checkpoints")
        announced: set[int] = set()
        published: set[int] = set()
        for record in log.records():
            if record["kind"] == "checkpoint":
                announced.add(record["data"]["step"])
            elif record["kind"] == "pruned":
                announced.discard(record["data"]["step"])
            elif record["kind"] == "published":
                published.add(record["data"]["step"])
        dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        dropped: dict[int, str] = {}
        for step in reversed(store.steps()):
            try:
                found = store.read(step, sites, base_digest)
            except CheckpointError as error:
                dropped[step] = str(error)
                continue
            _remove(store, dropped)
            params = cast_weights(found.weights, device, dtype)
            return Opened(spec, source, log, store, found.config, params, found.optimizer, found.state,
                          frozenset(announced), frozenset(published), dropped)  # fmt: skip
        _remove(store, dropped)
        config, weights = _initial(data_dir, spec, sites, base_digest)
        start = Progress(step=0, digest="", optimizer_digest="", trained_tokens=0)
        return Opened(spec, source, log, store, config, cast_weights(weights, device, dtype), {}, start,
                      frozenset(announced), frozenset(published), dropped)  # fmt: skip
    except BaseException:
        log.close()
        raise


def _remove(store: CheckpointStore, steps: Iterable[int]) -> None:
    """Steps that are done again must not find an old checkpoint in their place."""
    for step in steps:
        store.remove(step)


def _read_order(folder: Path, job_id: str, base_digest: str, vocab_size: int | None) -> tuple[JobSpec, BatchSource]:
    try:
        with open(folder / "spec.json", "rb") as file:
            spec = parse_spec(file.read(MAX_SPEC_BYTES + 1))
    except (OSError, SpecError) as error:
        raise JobError("invalid_job", f"The job's spec.json cannot be used: {error}") from error
    if spec.job_id != job_id:
        raise JobError("invalid_job", f"The job's spec.json is that of job {spec.job_id}.")
    if spec.base_digest != base_digest:
        raise JobError("base_model_mismatch", "The job was made for another base model than the one being served.")
    try:
        train = TokenRows(folder / "tokens" / "train.safetensors", vocab_size)
        valid = TokenRows(folder / "tokens" / "valid.safetensors", vocab_size) if spec.has_validation else None
    except DatasetError as error:
        raise JobError("invalid_training_file", f"The job's tokens cannot be used: {error}") from error
    return spec, BatchSource(spec, train, valid)


def _initial(data_dir: Path, spec: JobSpec, sites: Sequence[Site], base_digest: str) -> tuple[LoraConfig, LoraWeights]:
    """The adapter that the job starts from: another adapter's config and weights, or PEFT's initial values."""
    if spec.adapter.init is not None:
        try:
            return read_folder(data_dir / spec.adapter.init, sites, base_digest)
        except AdapterError as error:
            raise JobError("adapter_invalid", f"The adapter to start from cannot be used: {error.message}") from error
    config = LoraConfig(
        r=spec.adapter.r,
        alpha=spec.adapter.alpha,
        dropout=spec.adapter.dropout,
        target_modules=spec.adapter.target_modules,
    )
    try:
        config = config.with_names(sites)
        if not config.sites(sites):
            raise JobError("unsupported_value", "target_modules matches no module of the base model.")
    except PatternError as error:
        raise JobError("unsupported_value", f"target_modules cannot be used: {error}") from error
    return config, init_lora(sites, config, spec.seed)


def opening_failure(error: Exception) -> JobError:
    """Why a job could not be opened."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, OSError):
        if is_storage_full(error):
            return JobError("storage_full", NO_ROOM)
        return JobError("storage_error", f"The job's files cannot be used: {error.strerror}.")
    log.error("a job could not be opened", exc_info=error)
    fault = fault_of(error)
    return JobError(fault.code, f"The job could not be opened: {fault.message}.")


def record_failure(path: Path, job_id: str, on_event: OnEvent | None, failure: JobError) -> None:
    """The event of a job that could not be opened, if its event file can be written."""
    kind, level = "failed", "error"
    data: Record = {"code": failure.code, "message": failure.message}
    if failure.code == "storage_full":
        kind, level, data = "paused", "warn", {"step": 0, "reason": "storage_full"}
    try:
        events = EventLog(path)
        try:
            seq, record = events.append(kind, level, failure.message, data)
        finally:
            events.close()
    except OSError as error:
        log.error("job %s cannot write its event %r: %s", job_id, kind, error)
        return
    if on_event is not None:
        on_event(job_id, seq, record)
