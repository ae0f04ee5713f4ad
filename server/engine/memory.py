"""Whether what an engine will hold fits in memory, asked before anything is loaded, and what to do if not.

Everything counts with the most that it may ever take: an engine that starts is one that its own budgets do not end.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coserve.server.engine.options import EngineOptions

_GIB = 2**30
_REMEDY = {
    "the weights": "choose --dtype bfloat16 or a smaller model",
    "keys and values": "lower --kv-memory",
    "adapters": "lower --adapter-memory",
    "activations of training": "lower --activation-memory",
    "the adapter cache": "lower --adapter-cache-memory",
}


def memory_problem(weight_bytes: int, config: Any, dtype: torch.dtype, options: EngineOptions) -> str | None:
    """Why a model of `weight_bytes`, all copies counted, cannot be served with these options; None if it can."""
    device = options.torch_device()
    parts = {
        "the weights": weight_bytes,
        "keys and values": kv_bytes(config, dtype, options),
        "adapters": options.adapter_bytes(),
        "activations of training": options.activation_bytes(),
    }
    cache = {"the adapter cache": options.adapter_cache_bytes()}
    if device.type == "cuda":
        on_device = _too_much(parts, int(torch.cuda.mem_get_info(device)[0]), "on the device")
        return on_device or _too_much(cache, free_host_bytes(), "in the host's memory")
    return _too_much(parts | cache, free_host_bytes(), "here")


def kv_bytes(config: Any, dtype: torch.dtype, options: EngineOptions) -> int:
    """Of the K/V cache: what it may take, and never more than all running sequences could use."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) or 0) // max(heads, 1))
    context = options.max_model_len or int(getattr(config, "max_position_embeddings", None) or 4096)
    a_token = int(getattr(config, "num_hidden_layers", 0) or 0) * 2 * kv_heads * head_dim * dtype.itemsize
    most = options.running() * (context + options.block_size) * a_token
    return min(options.kv_bytes(), most) if most else options.kv_bytes()


def free_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may still take: of the machine, of its container, of its own limit."""
    rooms = [_machine_room()]
    rooms += [room for room in (_cgroup_room(cgroup), _limit_room()) if room is not None]
    return max(0, min(rooms))


def _too_much(parts: Mapping[str, int], free: int, where: str) -> str | None:
    wanted = sum(parts.values())
    if wanted <= free:
        return None
    told = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())
    remedies = [_REMEDY[name] for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size]
    return (
        f"it may take {wanted / _GIB:.1f} GiB and {free / _GIB:.1f} GiB are free {where} ({told}); "
        f"{', or '.join(remedies)}"
    )


def _machine_room() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_room(folder: Path) -> int | None:
    """Of the container (cgroup v2): its limit less what it uses, file pages apart, which the kernel gives back."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    except (OSError, ValueError):
        return None  # no such limit that we could read


def _limit_room() -> int | None:
    """Of the process's own limit of address space (`ulimit -v`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limit - pages * resource.getpagesize()
