"""Tables of a GPU: decode, adapters, training alone, co-serving, exactness, attention; random weights, no download.

    PYTHONPATH=src python benchmarks/gpu.py --table decode [--json FILE]
    PYTHONPATH=src python benchmarks/gpu.py --all --minutes 25 --json FILE

Weights are random, bfloat16, in the geometry of Llama-3.1-8B, made on the device. The engine is the product's, put
together by its own code and spoken to over its socket; only gateway and HTTP are missing. Every figure stands beside a
floor or a peer measured in the same run, and every aim is printed with met or missed. `--smoke` runs all of it at toy
size, on a CPU too: its figures mean nothing.

`--all` is for a machine that is there for a while only: the kernels' tests, then the tables, the most telling first,
each in a process of its own within what is left of `--minutes`; results are in the file after every row.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from pathlib import Path

from harness import cores, environment

TABLES = {"decode": "decode", "adapters": "adapters", "training": "training", "co-serving": "coserving",
          "exactness": "exactness", "attention": "attention"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", nargs="+", choices=TABLES, help="these, in one process")
    what.add_argument("--all", action="store_true", help="the tests of `pytest -m gpu`, then every table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, row by row")
    parser.add_argument("--smoke", action="store_true", help="toy size; works on a CPU")
    parser.add_argument("--device", help="[cuda, with --smoke cpu where there is none]")
    parser.add_argument("--kernels", default="auto", help="the engine's setting of that name [auto]")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads [all cores]")
    parser.add_argument("--minutes", type=float, help="what there is of time [with --all 25, else no limit]")
    arguments = parser.parse_args()
    # OpenMP reads its settings when torch is loaded.
    os.environ.update(environment(arguments.threads))
    if arguments.all:
        from gpu_tables.everything import run_all

        run_all(arguments)
        return

    import torch

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own names
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu" and not arguments.smoke:
        raise SystemExit("there is no CUDA device here; --smoke runs the tables at toy size on a CPU")

    from gpu_tables.bench import Bench
    from gpu_tables.limited import limited
    from gpu_tables.table import Results

    torch.set_num_threads(arguments.threads)
    bench = Bench(torch.device(name), arguments.smoke, arguments.threads, Results(arguments.json), arguments.kernels)

    def run(table: str) -> None:
        importlib.import_module(f"gpu_tables.{TABLES[table]}").run(bench)

    sys.exit(limited(arguments.table, run, arguments.minutes, bench.results))


if __name__ == "__main__":
    main()
