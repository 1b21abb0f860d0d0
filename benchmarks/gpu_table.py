"""The table of kernels/README.md from the figures of gpu.py: `python benchmarks/gpu_table.py [results/gpu.json]`."""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ["bare product", "encode", "product, relu, topk", "update from pairs", "step triton, 0 dead"]


def lines(result: dict[str, Any]) -> list[str]:
    """One row a case, milliseconds; then tokens/s of the step with AuxK off."""
    cases: dict[tuple[int, ...], dict[str, Any]] = {}
    for figure in result["figures"]:
        case = tuple(figure[size] for size in ("batch", "d_model", "n_latents", "k"))
        cases.setdefault(case, {})[figure["name"]] = figure
    table = [
        "| batch, d_model, n_latents, k | " + " | ".join([*COLUMNS, "step with 5 % dead", "tokens/s"]) + " |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for case, named in cases.items():
        dead = f"step triton, {case[2] // 20} dead"
        cells = [named.get(column, {}).get("ms") for column in [*COLUMNS, dead]]
        rate = named["step triton, 0 dead"].get("tokens_per_second")
        table.append(
            "| " + ", ".join(f"{size:,}" for size in case) + " | "
            + " | ".join("not measured" if cell is None else f"{cell:.2f}" for cell in cells)
            + f" | {'not measured' if rate is None else f'{rate:,.0f}'} |"
        )  # fmt: skip
    return table


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "gpu.json"
    sys.stdout.write("\n".join(lines(json.loads(path.read_text()))) + "\n")
