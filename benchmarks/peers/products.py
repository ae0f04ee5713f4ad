"""The floor: seconds of a model's bare products with its weights, in the quickest form that torch has on a CPU.

Two forms are timed shape by shape over whole passes in the model's order, so that weights come from memory as they
do in a model: `F.linear`, and oneDNN's packed weights. Random weights: only their shapes matter.

    {"rows": 8, "part": "layers" | "head", "transposed": false}  ->  {"seconds": …, "forms": {"640x2048": "packed"}}
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lines import Lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    lines = Lines()
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import torch
    import torch.nn.functional as F
    from harness import weight_shapes

    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    layers, head = weight_shapes(arguments.model)
    weights = {"layers": [torch.rand(shape) for shape in layers], "head": [torch.rand(head)]}
    packed: dict[tuple[str, bool], list[Any]] = {}

    def pack(part: str, transposed: bool) -> list[Any]:
        if (part, transposed) not in packed:
            sources = [w.t().contiguous() if transposed else w for w in weights[part]]
            packed[part, transposed] = [torch.ops.mkldnn._reorder_linear_weight(w, 64) for w in sources]
        return packed[part, transposed]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        rows, part, transposed = request["rows"], request["part"], request["transposed"]
        shapes = [tuple(w.t().shape if transposed else w.shape) for w in weights[part]]
        inputs = {shape: torch.rand(rows, shape[1]) for shape in set(shapes)}

        def plain(index: int) -> None:
            x, w = inputs[shapes[index]], weights[part][index]
            x @ w if transposed else F.linear(x, w)

        def onednn(index: int) -> None:
            x, w = inputs[shapes[index]], pack(part, transposed)[index]
            torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

        forms = {"plain": plain}
        if torch.backends.mkldnn.is_available():
            forms["packed"] = onednn
        seconds: dict[tuple[int, ...], dict[str, list[float]]] = {s: defaultdict(list) for s in inputs}
        for number in range(arguments.passes + 1):
            for name, product in forms.items():
                total: dict[tuple[int, ...], float] = defaultdict(float)
                for index, shape in enumerate(shapes):
                    began = time.perf_counter()
                    product(index)
                    total[shape] += time.perf_counter() - began
                for shape, spent in total.items():
                    if number:  # the first pass warms up
                        seconds[shape][name].append(spent)
        best = {s: min((statistics.median(t), name) for name, t in by.items()) for s, by in seconds.items()}
        return {
            "seconds": sum(spent for spent, _ in best.values()),
            "forms": {f"{s[0]}x{s[1]}": name for s, (_, name) in best.items()},
        }

    lines.serve({"torch": torch.__version__}, answer)


if __name__ == "__main__":
    main()
