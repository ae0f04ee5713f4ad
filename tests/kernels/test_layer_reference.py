"""The plain-torch norms, rotary embedding and gated activations against transformers' own modules, in every bit."""

from __future__ import annotations

import pytest
import torch
from kernel_device import fresh_seed
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from coserve.kernels.layer.reference import gated, rms_norm, rope

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module,unit_offset", [(LlamaRMSNorm, False), (Gemma3RMSNorm, True)])
def test_rms_norm(dtype, module, unit_offset):
    torch.manual_seed(fresh_seed())
    norm = module(48, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 48, dtype=dtype)
    assert torch.equal(rms_norm(x, norm.weight.detach(), 1e-5, unit_offset=unit_offset), norm(x).detach())


def test_rope():
    torch.manual_seed(fresh_seed())
    q, angles = torch.randn(5, 3, 16), torch.randn(5, 16)
    want, _ = apply_rotary_pos_emb(q[None], q[None], angles.cos()[None], angles.sin()[None], unsqueeze_dim=2)
    assert torch.allclose(rope(q, angles.cos(), angles.sin()), want[0], atol=1e-6)
    wider = torch.cat((q, q), -1)
    partial = rope(wider, angles.cos(), angles.sin())
    assert torch.allclose(partial[..., :16], want[0], atol=1e-6) and torch.equal(partial[..., 16:], q)


@pytest.mark.parametrize("ours,theirs", [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_gated(ours, theirs):
    torch.manual_seed(fresh_seed())
    gate, up = torch.randn(5, 33), torch.randn(5, 33)
    assert torch.allclose(gated(gate, up, ours), ACT2FN[theirs](gate) * up, atol=1e-6)
