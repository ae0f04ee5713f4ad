"""Jobs and streams for faults to interrupt. For tests only."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from live_server import LiveServer


class Stream:
    """One streamed completion, read in the background by the official client."""

    def __init__(self, server: LiveServer, max_tokens: int = 450) -> None:
        self._client = server.openai(max_retries=0, timeout=120)
        self._max_tokens = max_tokens
        self.pieces: list[str] = []
        self.finish: str | None = None
        self.error: Any = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self.pieces and self._thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert self.pieces, self.error

    def _read(self) -> None:
        try:
            chunks = self._client.completions.create(
                model="tiny", prompt="one two three", max_tokens=self._max_tokens, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            for chunk in chunks:
                self.pieces.append(chunk.choices[0].text)
                self.finish = chunk.choices[0].finish_reason or self.finish
        except Exception as error:  # noqa: BLE001 - whatever the client raises is what the test looks at
            self.error = error

    def wait(self, seconds: float = 120) -> Stream:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream never ended"
        return self


class Job:
    """One finetuning job, by the official client."""

    def __init__(self, server: LiveServer, steps: int, **training: Any) -> None:
        self.server = server
        rows = "".join(json.dumps({"prompt": f"{i}:", "completion": f" {i * 7} and {i}"}) + "\n" for i in range(16))
        client = server.openai()
        file = client.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune")
        self.id = client.fine_tuning.jobs.create(
            model="tiny", training_file=file.id, seed=7,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 4}}},
            extra_body={"training": {"max_steps": steps, "checkpoint_every": 10, **training}, "adapter": {"r": 4}},
        ).id  # fmt: skip

    def get(self) -> Any:
        return self.server.openai().fine_tuning.jobs.retrieve(self.id)

    @property
    def step(self) -> int:
        return self.get().progress["step"] or 0

    def until_step(self, step: int) -> None:
        self.server.until(lambda: self.step >= step)

    def succeeded(self, seconds: float = 200) -> Any:
        """The job, once it has succeeded."""
        job = self.server.until(lambda: (j := self.get()).status in ("succeeded", "failed", "cancelled") and j, seconds)
        assert job.status == "succeeded", job
        return job
