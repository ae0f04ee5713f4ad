"""What the tables of one run share: the device, the size, the model, the ceilings, and where results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from harness import machine, say

from coserve.server.engine.backend import Backend, choose_backend
from coserve.server.engine.load import LoadedModel
from coserve.server.training.fault import is_out_of_memory
from gpu_tables.ceilings import copy_rate, product_rate
from gpu_tables.clock import Clock, Memory
from gpu_tables.geometry import LLAMA_8B, TOY, Geometry, loaded_model
from gpu_tables.stand import Stand
from gpu_tables.table import OUT_OF_MEMORY, Results, Table

Measured = TypeVar("Measured")


@dataclass
class Bench:
    """`smoke`: everything at toy size, on a CPU if need be."""

    device: torch.device
    smoke: bool
    threads: int
    results: Results
    kernels: str = "auto"  # as in the engine's settings

    @property
    def geometry(self) -> Geometry:
        return TOY if self.smoke else LLAMA_8B

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device)

    @cached_property
    def memory(self) -> Memory:
        return Memory(self.device)

    @cached_property
    def model(self) -> LoadedModel:
        """The weights that all stands of a run share."""
        say(f"{self.geometry.name}, random weights")
        return loaded_model(self.geometry, self.dtype, self.device, kernels=self.kernels)

    @property
    def backend(self) -> Backend:
        """As an engine would choose it; stateless."""
        return choose_backend(self.kernels, self.dtype, self.device)

    @cached_property
    def copy_rate(self) -> float:
        return copy_rate(self.device, large=not self.smoke)

    @cached_property
    def product_rate(self) -> float:
        return product_rate(self.device, self.dtype, large=not self.smoke)

    def stand(self, model: LoadedModel | None = None, **options: Any) -> Stand:
        """An engine of these options. What one before it held is given back first."""
        self.memory.release()
        say("an engine on the stand")
        return Stand(model or self.model, kernels=self.kernels, **options)

    def attempt(
        self, table: Table, what: str, measure: Callable[[], Measured], stand: Stand | None = None
    ) -> Measured | None:
        """What `measure` returns. None where memory ran out: the table says so in a note and goes on, and all requests
        of the `stand` are dropped."""
        try:
            return measure()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:200]
        # Only now is the exception gone, and with it the frames that held tensors.
        say(f"{what}: {OUT_OF_MEMORY}")
        table.notes.append(f"{what}: {OUT_OF_MEMORY}: {words}")
        if stand is not None:
            stand.connect()
        self.memory.release()
        return None

    def table(self, name: str, title: str, columns: list[str]) -> Table:
        shape = f"{self.geometry.name}, {str(self.dtype).removeprefix('torch.')}"
        table = Table(name, f"{title} ({shape})", columns, self._facts(), self.results)
        if self.smoke:
            table.notes.append("Toy size: these figures say that the table works, and nothing of speed or of its aims.")
        return table

    def _facts(self) -> dict[str, str]:
        more = {"kernels": self.backend.name}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            more["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
            more["CUDA"] = str(torch.version.cuda)
        try:
            import triton

            more["triton"] = triton.__version__
        except ImportError:
            more["triton"] = "absent"
        return machine(self.threads, more)
