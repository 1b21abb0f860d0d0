"""Whole training steps against other trainers: same activations, latents, k and batch, one process each, in turn.

    python -m benchmarks.peers --cache ~/.cache/sae_dist/bench [--latents 16384] [--steps 12] [--rounds 2]

Each peer is installed from PyPI into its own environment under the cache folder. A round runs every contender once, in
an order that alternates from round to round; a contender's time is the median of its steps after the third in all
rounds, and its processor time stands beside it, which other programs on the machine disturb less. Memory is the peak of
the whole process. FVU is on held-out rows after the same tokens, each trainer with the initialisation and learning rate
it chooses itself.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.activations import load
from benchmarks.kernels import features


class Peer(NamedTuple):
    """What to install, and what must go again (torchvision of another torch breaks transformers' import)."""

    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()


PEERS = {
    "sparsify": Peer(("eai-sparsify==1.3.3",)),
    "sae_lens": Peer(("sae-lens==6.54.12",)),
    "dictionary_learning": Peer(("dictionary-learning==0.1.0", "transformers<5"), ("torchvision",)),
    "llamascopium": Peer(("llamascopium==2.0.0b34", "transformer-lens<4")),
}
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    # keep freed memory: otherwise every step faults its gigabytes in again, and the peers are up to 2.8 times slower
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}


def environment(name: str, folder: Path) -> Path:
    """The Python of a peer's own environment, made on first use."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / name)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python), *_links(), *PEERS[name].requirements]
        subprocess.run([*install, f"torch=={_torch_version()}"], check=True)
        for package in PEERS[name].remove:
            subprocess.run([uv, "pip", "uninstall", "--quiet", "--python", str(python), package], check=True)
    return python


def _links() -> list[str]:
    """pip's own list of local wheels, which uv does not read."""
    pip = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = subprocess.run(pip, capture_output=True, text=True)
    return [part for link in found.stdout.split() for part in ("--find-links", link)]


def _torch_version() -> str:
    import torch

    return torch.__version__


def run(name: str, mode: str, arguments: argparse.Namespace, activations: Path) -> dict:
    python = Path(sys.executable) if name == "ours" else environment(name, arguments.cache / "peers")
    sizes = [str(s) for s in (arguments.latents, arguments.k, arguments.batch, arguments.steps)]
    worker = str(Path(__file__).with_name("peer_step.py"))
    # -P: not this folder on the path, where transformers would take kernels.py for the module of that name
    command = [*shlex.split(arguments.prefix), str(python), "-P", worker, name, mode, str(activations), *sizes]
    own = ENVIRONMENT if mode == "fast" else {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["ours", *PEERS])
    parser.add_argument("--modes", nargs="*", default=["fast", "documented"])
    parser.add_argument("--prefix", default="", help="a command to put before every run, such as taskset")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    arguments = parser.parse_args()
    activations = load(arguments.cache)
    contenders = [
        (name, mode) for name in arguments.only for mode in arguments.modes if (name, mode) != ("ours", "documented")
    ]
    runs: dict[str, list[dict]] = {f"{name}/{mode}": [] for name, mode in contenders}
    for round_ in range(arguments.rounds):
        for name, mode in contenders if round_ % 2 == 0 else reversed(contenders):
            runs[f"{name}/{mode}"].append(run(name, mode, arguments, activations))
            sys.stderr.write(f"{name}/{mode}: {_summary(runs[f'{name}/{mode}'], arguments.batch)}\n")
            write(runs, arguments)


def write(runs: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    """What there is so far: a round takes minutes."""
    processor = platform.processor() or platform.machine()
    result = {
        "machine": {"processor": processor, "cores": os.cpu_count(), "features": features()},
        "load": os.getloadavg()[0],
        "versions": {name: peer.requirements for name, peer in PEERS.items()} | {"torch": _torch_version()},
        "sizes": {name: getattr(arguments, name) for name in ("latents", "k", "batch", "steps", "rounds")},
        "contenders": {name: _summary(own, arguments.batch) | {"runs": own} for name, own in runs.items() if own},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _summary(runs: list[dict], batch: int) -> dict:
    good = [r for r in runs if "error" not in r]
    if not good:
        return {"error": runs[-1]["error"]}
    seconds = statistics.median(s for r in good for s in r["seconds"][3:])
    processor = statistics.median(s for r in good for s in r["processor_seconds"][3:])
    return {
        "seconds_per_step": round(seconds, 4),
        "processor_seconds_per_step": round(processor, 4),
        "tokens_per_second": round(batch / seconds),
        "peak_gb": round(max(r["peak_bytes"] for r in good) / 1e9, 3),
        "fvu": round(good[-1]["fvu"], 4),
        "autocast": good[-1]["autocast"],
    }


if __name__ == "__main__":
    main()
