"""The wall between one owner's failure and the engine: runs a piece of work and says what went wrong with it.

It may only be put around work that books nothing, or whose books the caller gives up as a whole when it fails.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable

import torch

from coserve.server.training.fault import OUT_OF_MEMORY, Fault, device_lost, fault_of

log = logging.getLogger("coserve.engine")


def attempt(what: str, work: Callable[[], object]) -> Fault | None:
    """None if `work` is done. Raises only if the device is lost: then there is nothing to go on with.

    When it returns, the exception is gone, and with it the frames that held its tensors.
    """
    try:
        work()
        return None
    except Exception as error:
        if device_lost(error):
            raise
        fault = fault_of(error)
        if fault.code == OUT_OF_MEMORY:
            log.warning("%s: memory ran out: %s", what, " ".join(str(error).split())[:200])
        else:
            log.exception("%s failed", what)
    if fault.code == OUT_OF_MEMORY:
        give_back_memory()
    return fault


def give_back_memory() -> None:
    """What is free inside this process becomes free for every kind of allocation.

    Tensors that were freed may still be the allocator's, where oneDNN's compiler, which maps its memory, finds none.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
