"""One whole server on a tiny model for the tests that need a real engine."""

import pytest
from live_server import LiveServer
from tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    with LiveServer(tiny_llama, tmp_path_factory.mktemp("server") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tiny_llama):
    return Oracle(tiny_llama)


class Oracle:
    """The same model in transformers."""

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def greedy(self, ids, tokens, *, eos=True):
        """New ids after `ids`, by transformers' own generate."""
        import torch

        with torch.no_grad():
            out = self.model.generate(
                torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
                eos_token_id=2 if eos else None,
            )  # fmt: skip
        return out[0, len(ids) :].tolist()

    def logprobs(self, ids):
        """Log-probabilities [len(ids), vocabulary] of what follows each token."""
        import torch

        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), dim=-1)

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)
