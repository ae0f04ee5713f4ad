"""Every Triton kernel compiles for a Hopper GPU, which needs no GPU: what the interpreter accepts, Triton may not.

Says nothing about speed. The compiled code is looked at for three promises: no atomics, so that sums repeat bit for
bit; shared memory within what a multiprocessor has; 16 bytes a load where tiles lie inside pages.
"""

from __future__ import annotations

import os
import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coserve.kernels.attention import paged, varlen
from coserve.kernels.attention.spans import span_batch
from coserve.kernels.layer import kernel as layer
from coserve.kernels.lora import grouped as lora
from coserve.kernels.lora import per_row

SHARED_BYTES = 227 * 1024  # of one multiprocessor, sm_90
ATOMIC = re.compile(r"^\s*(@%p\d+ )?(atom|red)\.", re.MULTILINE)
WIDE_LOAD = re.compile(r"cp\.async\.cg\.|ld\.global\.v4\.b32")
# Pointers by name: to the model's dtype, to float32, to int32. Every other argument is an int32 or a constant.
MODEL = {"x", "y", "flat", "right", "query", "keys", "values",
         "q", "k", "v", "grad", "dq", "dk", "dv", "dx", "dy", "weight", "cos", "sin",
         "gate", "up", "d_gate", "d_up"}  # fmt: skip
FLOATS = {"lse", "delta", "hidden", "parts", "scaling", "part_out", "part_max", "part_sum", "sinks"}
INTS = {"rows", "owners", "blocks", "chunks", "chunk_starts", "numbers", "index", "columns",
        "spans", "tables", "contexts", "starts", "counts", "tiles"}  # fmt: skip
# Strides and page sizes: wide loads, and with them the buffers that they are loaded ahead into, hang on these.
MULTIPLES = ("_stride", "_row", "_head", "_slot", "page_elements")

LORA = {"SPLITS": 4, "BLOCK_R": 32, "WIDEN": False}
SHRINK = LORA | {"SLICES": 2, "BLOCK_M": 16, "BLOCK_K": 128}
ATTEND = {"BLOCK_SIZE": 16, "GROUP": 4, "WINDOW": True, "SOFTCAP": True, "SINKS": True, "WIDEN": False}


def heads(dim, rows, splits):
    sizes = {"DIM": dim, "VALUE_DIM": dim, "BLOCK_D": dim, "BLOCK_V": dim, "BLOCK_M": 4 * rows, "BLOCK_N": 64}
    return ATTEND | sizes | {"ROWS": rows, "SPLITS": splits}


def span_heads(dim, dtype):
    """With the tiles that a span batch gives such heads."""
    sizes = {"DIM": dim, "VALUE_DIM": dim, "BLOCK_D": dim, "BLOCK_V": dim}
    block = span_batch([], dim * {"bf16": 2, "fp32": 4}[dtype]).block
    return {"GROUP": 4, "WINDOW": True, "SOFTCAP": True, "WIDEN": False, "BLOCK": block} | sizes


# A tile's row is 256, 512 or 1024 bytes wide: every size of tile that there is.
SPANS = {
    f"training {name}, {dim} in {dtype}": (function, dtype, dtype, span_heads(dim, dtype) | sinks)
    for name, function, sinks in (
        ("forward", varlen._forward, {"SINKS": True}),
        ("backward, queries", varlen._backward_queries, {}),
        ("backward, keys", varlen._backward_keys, {}),
    )
    for dim in (128, 256)
    for dtype in ("bf16", "fp32")
}

KERNELS = {
    "shrink": (lora._shrink, "bf16", "fp32", SHRINK | {"PART": 1, "IN_ROW": True}),
    "shrink, pages end in a row": (lora._shrink, "fp32", "fp32", SHRINK | {"PART": 2, "IN_ROW": False}),
    "expand": (
        lora._expand, "bf16", "bf16", LORA | {"PART": 2, "SLICES": 2, "BLOCK_M": 64, "BLOCK_N": 128, "IN_ROW": True},
    ),
    "shrink, all adapters": (
        per_row._shrink_all, "bf16", "fp32", LORA | {"ADAPTERS": 32, "BLOCK_M": 32, "BLOCK_K": 128, "IN_ROW": True},
    ),
    "shrink, one adapter": (
        per_row._shrink_all, "bf16", "fp32", LORA | {"ADAPTERS": 1, "BLOCK_M": 16, "BLOCK_K": 128, "IN_ROW": False},
    ),
    "expand, row by row": (
        per_row._expand_rows, "bf16", "bf16",
        {"SLICES": 3, "SPLITS": 4, "BLOCK_R": 32, "BLOCK_N": 128, "IN_ROW": True},
    ),
    "weight_grad": (lora._weight_grad, "bf16", "fp32", LORA | {"BLOCK_M": 64, "BLOCK_N": 128}),
    "add_chunks": (lora._add_chunks, "bf16", "fp32", {"BLOCK_R": 32, "BLOCK_N": 128}),
    "prefill 256": (paged._attend, "bf16", "bf16", heads(256, 16, 1)),
    "decode 128": (paged._attend, "bf16", "bf16", heads(128, 4, 4)),
    "combine": (paged._combine, "bf16", "bf16", {"VALUE_DIM": 128, "BLOCK_V": 128, "SINKS": True, "SPLITS": 16}),
    **SPANS,
    "rms_norm": (layer._rms_norm, "bf16", "bf16", {"UNIT_OFFSET": False, "BLOCK": 4096}),
    "rms_norm_backward": (layer._rms_norm_backward, "bf16", "bf16", {"UNIT_OFFSET": True, "BLOCK": 4096}),
    "rope": (
        layer._rope, "bf16", "bf16",
        {"ROTARY": 96, "DIM": 128, "BACKWARD": True, "HEADS": 8, "HALF": 64, "REST": 32},
    ),
    "gated": (layer._gated, "bf16", "bf16", {"ACTIVATION": "gelu", "BLOCK": 1024}),
    "gated_backward": (layer._gated_backward, "bf16", "bf16", {"ACTIVATION": "gelu_tanh", "BLOCK": 1024}),
}  # fmt: skip
# What multiplies no matrices.
ELEMENTWISE = (lora._add_chunks, per_row._expand_rows, paged._combine, layer._rms_norm, layer._rms_norm_backward,
               layer._rope, layer._gated, layer._gated_backward)  # fmt: skip


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # rounding of a multiply-add is not looked at here
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, model, out, constants = KERNELS[name]

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in ("scale", "softcap", "eps"):
            return "fp32"
        pointed = {
            **dict.fromkeys(MODEL, model),
            **dict.fromkeys(FLOATS, "fp32"),
            **dict.fromkeys(INTS, "i32"),
            "out": out,
        }
        return f"*{pointed[argument]}" if argument in pointed else "i32"

    signature = {argument: kind(argument) for argument in function.arg_names}
    free = {parameter.name for parameter in function.params if parameter.do_not_specialize}
    assert free >= signature.keys() & INTS  # a batch's integers lie anywhere: a kernel for each alignment is too many
    aligned = {  # as launches of usual shapes are
        (n,): [["tt.divisibility", 16]]
        for n, (argument, kind) in enumerate(signature.items())
        if (kind.startswith("*") or argument.endswith(MULTIPLES)) and argument not in free
    }
    compiled = triton.compile(ASTSource(function, signature, constants, aligned), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES
    assert not ATOMIC.search(compiled.asm["ptx"])
    if constants.get("IN_ROW"):
        assert WIDE_LOAD.search(compiled.asm["ptx"])
    if model == "bf16" and function not in ELEMENTWISE:
        assert "mma" in compiled.asm["ptx"]  # the matrix unit, not multiply-adds one by one
