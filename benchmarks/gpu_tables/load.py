"""A process that sends an engine requests at random moments and times their tokens, as the gateway's clients see them.

One JSON object on standard input says what to send, one on standard output what came of it. Requests of the warm-up
do not count; those of the window do, whenever they end, and arrivals go on until they have. What did not end in time
is a miss. Imports no torch.

    {"socket": path, "rate": 1/s, "warm": s, "seconds": s, "prompt": tokens, "new_tokens": n, "spread": σ of both,
     "vocabulary": n, "seed": n, "itl": s, "ttft": s}
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from harness import percentile

from coserve.server.wire.codec import HEADER_BYTES, decode, encode, frame_length
from coserve.server.wire.messages import Failed, Generate, SamplingParams, Tokens


@dataclass
class Sent:
    """Seconds of the process's monotonic clock; `times` are those of the tokens."""

    arrived: float
    new_tokens: int
    counts: bool
    times: list[float] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.times) >= self.new_tokens

    def inside(self, itl: float, ttft: float) -> bool:
        """Both promises: time to the first token, and time per output token after it."""
        if not self.ended or self.times[0] - self.arrived > ttft:
            return False
        return len(self.times) == 1 or (self.times[-1] - self.times[0]) / (len(self.times) - 1) <= itl


class Connection:
    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._pending = bytearray()

    def send(self, message: Any) -> None:
        self._socket.settimeout(None)
        self._socket.sendall(encode(message))

    def receive(self, seconds: float) -> Iterator[Any]:
        """What comes within so many seconds, until something does."""
        self._socket.settimeout(max(seconds, 1e-4))
        try:
            chunk = self._socket.recv(1 << 20)
        except TimeoutError:
            return
        if not chunk:
            raise ConnectionError("the engine has closed the connection")
        self._pending += chunk
        start = 0
        while len(self._pending) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            end = body + frame_length(self._pending[start:body])
            if end > len(self._pending):
                break
            yield decode(bytes(self._pending[body:end]))
            start = end
        del self._pending[:start]


def main() -> None:
    order = json.loads(sys.stdin.read())
    rng = random.Random(order["seed"])
    connection = Connection(order["socket"])
    sent: dict[str, Sent] = {}
    failed = 0
    began = time.monotonic() + 0.05
    opens, closes = began + order["warm"], began + order["warm"] + order["seconds"]
    # Longer than any request that keeps its promises takes.
    patience = closes + order["ttft"] + 3 * order["new_tokens"] * order["itl"]
    wall = time.time() - time.monotonic()
    arrival = began + rng.expovariate(order["rate"])
    output = 0
    while (now := time.monotonic()) < patience:
        if now > closes and all(s.ended for s in sent.values() if s.counts):
            break
        while arrival <= time.monotonic():
            name = f"load-{order['seed']}-{len(sent)}"
            prompt, new_tokens = (_length(rng, order[key], order["spread"]) for key in ("prompt", "new_tokens"))
            sent[name] = Sent(arrival, new_tokens, opens <= arrival < closes)
            ids = tuple(rng.choices(range(3, order["vocabulary"]), k=prompt))
            params = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0)
            connection.send(Generate(name, "load", ids, params, None, "load", arrival))
            arrival += rng.expovariate(order["rate"])
        for message in connection.receive(min(arrival, patience) - time.monotonic()):
            now = time.monotonic()
            if isinstance(message, Tokens):
                sent[message.request_id].times += [now] * len(message.token_ids)
                output += len(message.token_ids) * (opens <= now < closes)
            elif isinstance(message, Failed):
                failed += 1
    counted = [s for s in sent.values() if s.counts]
    inside = sum(s.inside(order["itl"], order["ttft"]) for s in counted)
    firsts = [s.times[0] - s.arrived for s in counted if s.times]
    gaps = [b - a for s in counted for a, b in zip(s.times, s.times[1:], strict=False)]
    answer = {
        "requests": len(counted), "inside": inside, "failed": failed,
        "attainment": inside / len(counted) if counted else None,
        "ttft": [percentile(firsts, share) for share in (0.5, 0.99)],
        "itl": [percentile(gaps, share) for share in (0.5, 0.99)],
        "output_tokens_per_second": output / order["seconds"], "opened": opens + wall, "closed": closes + wall,
    }  # fmt: skip
    print(json.dumps(answer))


def _length(rng: random.Random, mean: int, spread: float) -> int:
    """Lognormal around the mean, at most twice it."""
    drawn = mean * rng.lognormvariate(-(spread**2) / 2, spread) if spread else mean
    return max(1, round(min(drawn, 2 * mean)))


if __name__ == "__main__":
    main()
