"""What an exception means to the job or request that it struck: a code and a text for its tenant. Pure.

Some exceptions are nobody's fault in particular and leave nothing to go on with; `device_lost` tells those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OUT_OF_MEMORY = "out_of_memory"
INTERNAL = "internal_error"

# What torch, oneDNN and the C++ library say on a CPU, where there is no exception type of its own for it.
_TEXTS = ("can't allocate memory", "bad_alloc", "not enough memory", "could not create a memory", "out of memory",
          "could not execute a primitive")  # fmt: skip
# oneDNN compiles a product once a shape. Once that failed for want of memory, it fails in this thread for ever, however
# much memory there is (seen with torch 2.13).
_NO_MORE_PRODUCTS = "could not create a primitive"
_CAUSES = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """`message` is for the tenant: it has no path, no address and no text of an exception that nobody foresaw."""

    code: str  # an error code of the HTTP API
    message: str


def fault_of(error: BaseException) -> Fault:
    """Memory that ran out, or anything else."""
    if is_out_of_memory(error):
        return Fault(OUT_OF_MEMORY, "the server's memory ran out")
    return Fault(INTERNAL, "an internal error; the server's log has the cause")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, on the device or the host; also where that made something else fail."""
    for _ in range(_CAUSES):
        if error is None:
            return False
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def device_lost(error: BaseException) -> bool:
    """Whether the device takes no work of this process any more: a CUDA context does not survive its errors, and
    oneDNN's compiler does not survive that it had no memory."""
    if isinstance(error, RuntimeError) and _NO_MORE_PRODUCTS in str(error):
        return True
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def told(fault: Fault, step: int | None, *, in_parts: bool) -> str:
    """What a job that ends with `fault` says; `in_parts`: the step was also tried in small ones."""
    if fault.code != OUT_OF_MEMORY:
        return "An internal error ended the job; the server's log has the cause."
    where = f" in step {step}, also in small parts" if in_parts else ""
    return (
        f"Memory ran out{where}. Train on shorter rows (training.max_length) or with a smaller rank, or start the "
        "server with a smaller --kv-memory, --adapter-memory or --train-window."
    )


def row_too_long(tokens: int, most: int) -> tuple[str, str]:
    """(code, message) for a job with a row of `tokens` tokens where the activations of `most` can be kept."""
    return OUT_OF_MEMORY, (
        f"A row of {tokens} tokens needs more activation memory than there is: it holds {most} tokens. Train on "
        "shorter rows (training.max_length), or start the server with a larger --activation-memory."
    )
