"""Random bodies from known names and hostile values: always an answer, never a 5xx, and only sane parameters inside."""

import asyncio
import math
import random

from scripted_engine import in_world

from coserve.server.api.chat import ChatRequest
from coserve.server.api.completions import CompletionRequest
from coserve.server.wire.messages import Generate, TokenLogprob, Tokens

ODD = [
    None, True, False, 0, 1, -1, 2, 16, 64, 65, 2**31, -(2**63), 2**64, 10**400, 0.0, 0.5, -0.5, 1e308, -1e308, 5e-324,
    "", "1", "x", "\n", "😀" * 300, [], [None], [0], [1, 2, 3], ["a"], ["a", ""], [[1]], [[]], {}, {"a": 1}, {"5": 1},
    {"5": None}, {"type": "text"}, {"include_usage": True}, {"role": "user", "content": "hi"},
    [{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": [], "content": {}}], {"": ""}, [[[[]]]],
]  # fmt: skip
UNSERVED = ["tools", "tool_choice", "response_format", "best_of", "suffix", "prompt_logprobs", "priority", "modalities"]


def test_random_bodies(tmp_path):
    async def scenario(world):
        engine = world.engine
        plain = engine._answer

        def answer(message):
            if isinstance(message, Generate):
                asked = message.sampling.logprobs is not None
                entries = tuple(TokenLogprob(id_, -1.0, ((id_, -1.0),)) for id_ in (40, 2)) if asked else ()
                return Tokens(message.request_id, (40, 2), "stop", 0, entries, (), True)
            return plain(message)

        engine._answer = answer
        chooser = random.Random(6)
        good = {
            "/v1/chat/completions": (ChatRequest, {"model": "base", "messages": [{"role": "user", "content": "hi"}]}),
            "/v1/completions": (CompletionRequest, {"model": "base", "prompt": "hi"}),
        }
        seen = set()
        for count in range(1200):
            path = chooser.choice(list(good))
            fields, base = good[path]
            names = chooser.sample([*fields.model_fields, *UNSERVED, "unheard_of"], chooser.choice([1, 1, 1, 2, 4]))
            body = {**base, **{name: chooser.choice(ODD) for name in names}}
            async with asyncio.timeout(5):
                response = await world.a.post(path, json=body)
            assert response.status_code in (200, 400, 404, 429), (body, response.text)
            seen.add(response.status_code)
            if response.status_code != 200:
                assert response.json()["error"]["message"], body
            if count % 300 == 0:
                await asyncio.sleep(0)
        assert {200, 400, 404} <= seen
        await world.until(lambda: world.services.generation.running == 0)
        assert world.services.generation.admission.waiting == 0
        received = engine.of(Generate)
        assert len(received) > 50
        for message in received:
            sampling = message.sampling
            assert 0 <= sampling.temperature <= 2 and 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
            assert 0 <= sampling.seed < 2**63 and 0 <= sampling.top_k < 2**31
            assert 1 <= sampling.max_tokens <= 256 - len(message.prompt_ids)
            assert 0 <= sampling.min_tokens <= sampling.max_tokens
            assert all(0 <= token_id < 512 and math.isfinite(bias) for token_id, bias in sampling.logit_bias.items())
            assert all(0 <= token_id < 512 for token_id in (*message.prompt_ids, *sampling.stop_token_ids))

    in_world(tmp_path, scenario)
