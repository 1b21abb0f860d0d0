"""Harvesting speed: against the plain forward pass, against other harvesters, and three hook points against one.

    python -m benchmarks.harvest --cache ~/.cache/sae_dist/bench [--cases forward hooks replicas peers] [--rounds 5]

All cases take the same tokens through SmolLM2-135M to the same layer, in fp32 where the processor has no bf16.

- `forward`: a bare loop over a copy of the model that ends after that layer (nothing is kept), at several batch sizes,
  against `Harvester`, which also picks rows, encodes, checksums and commits them to a store on disk. Both in a process,
  in turn, a unit each; medians of the pairs.
- `hooks`: the same for three hook points against one; the two others are earlier layers.
- `replicas`: the command with two replicas against one (harvest_replicas.py), `--units` units a run.
- `peers`: SAELens' CacheActivationsRunner (writes to disk) and sparsify's Trainer (a dictionary of 64 latents, so that
  next to nothing is left but its harvesting; it keeps no activations), each in an environment of its own from PyPI,
  beside ours, a process each, in turn.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harvest_replicas
from benchmarks.peers import PEERS, environment

LAYER, CONTEXT = 9, 128
WORKER = Path(__file__).with_name("harvest_worker.py")


def tokens(cache: Path, n_sequences: int) -> Path:
    """The folder with the built-in text as a token stream and, for peers, as `tokens.npy`, int32 [n, context]."""
    folder = cache / f"harvest-tokens-{n_sequences}"
    if (folder / "tokens.npy").exists():
        return folder
    from sae_dist.model.config import ModelConfig
    from sae_dist.model.load import load
    from sae_dist.text.builtin import BuiltinText
    from sae_dist.text.tokenize import tokenize

    split = tokenize(
        BuiltinText(), load(ModelConfig(name="smollm2")).tokenizer, context=CONTEXT, n_tokens=n_sequences * CONTEXT,
        heldout_fraction=0.0, seed=0, folder=folder / "text",
    )  # fmt: skip
    np.save(folder / "tokens.npy", np.asarray(split.train.tokens).reshape(-1, CONTEXT).astype(np.int32))
    return folder


def work(name: str, arguments: argparse.Namespace, python: Path | None = None) -> dict[str, Any]:
    """What one worker process measured."""
    from sae_dist.model import smollm2

    given = {
        "tokens": str(tokens(arguments.cache, arguments.sequences)),
        "model": str(smollm2.model_folder()),
        "layer": LAYER,
        "rounds": arguments.rounds,
        "threads": arguments.threads or os.cpu_count(),
    }
    # -P: not this folder on the path, where transformers would take kernels.py for the module of that name
    command = [str(python or sys.executable), "-P", str(WORKER), name, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every contender once a round, in an order that turns round from round to round."""
    contenders: dict[str, Callable[[], Path | None]] = {
        "ours": lambda: None,
        "sae_lens": lambda: environment("sae_lens", arguments.cache / "peers"),
        "sparsify": lambda: environment("sparsify", arguments.cache / "peers"),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for round_ in range(arguments.peer_rounds):
        for name in list(contenders) if round_ % 2 == 0 else reversed(list(contenders)):
            runs[name].append(work(name, arguments, contenders[name]()))
            sys.stderr.write(f"{name}: {runs[name][-1]}\n")
    result: dict[str, Any] = {}
    for name, own in runs.items():
        good = [run["tokens_per_second"] for run in own if "error" not in run]
        result[name] = {"tokens_per_second": round(statistics.median(good), 1) if good else None, "runs": own}
    return result


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "forward": lambda arguments: work("forward", arguments),
    "hooks": lambda arguments: work("hooks", arguments),
    "replicas": lambda arguments: harvest_replicas.compare(
        arguments.units, arguments.replica_rounds, f"resid_post.{LAYER}"
    ),
    "peers": peers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sequences", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--units", type=int, default=24, help="replicas: of 8,192 positions, a run")
    parser.add_argument("--replica-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/harvest.json"))
    arguments = parser.parse_args()
    arguments.cache = arguments.cache.expanduser()
    for case in arguments.cases:
        measured = CASES[case](arguments)
        sys.stderr.write(f"{case}: {json.dumps(measured)[:400]}\n")
        write(arguments, case, measured)


def write(arguments: argparse.Namespace, case: str, measured: dict[str, Any]) -> None:
    """This case into the result file, beside the cases of other runs."""
    import torch
    import transformers

    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result[case] = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({name: PEERS[name].requirements for name in ("sae_lens", "sparsify")} if case == "peers" else {}),
        },
        "sizes": {
            "sequences": arguments.sequences,
            "context": CONTEXT,
            "layers": LAYER + 1,
            "rounds": arguments.rounds,
        },
        **measured,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
