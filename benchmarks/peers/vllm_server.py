"""vLLM's API server on a CPU, asked over HTTP by the client that asks coserve; in an environment of its own.

{"prompts": [[ids]], "new_tokens": 64}  ->  {"seconds": …, "tokens": …}
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from completions import Completions
from lines import Lines

READY_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--most-requests", type=int, default=16)
    arguments = parser.parse_args()
    lines = Lines()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_NO_USAGE_STATS": "1"}
    # Not `vllm serve`: it asks for the version of a package named vllm, which this build is not.
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={arguments.model}",
         "--served-model-name=model", "--host=127.0.0.1", f"--port={port}", "--dtype=float32", "--max-model-len=512",
         f"--max-num-seqs={arguments.most_requests}", "--no-enable-prefix-caching", "--uvicorn-log-level=warning"],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **settings},
    )  # fmt: skip
    _wait_ready(server, port)
    completions = Completions(port, "model")

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        return {"seconds": completions.generate(prompts, new_tokens), "tokens": len(prompts) * new_tokens}

    lines.serve({"vllm": _version()}, answer)


def _wait_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"vLLM's server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"vLLM's server was not ready after {READY_SECONDS} s")


def _version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    main()
