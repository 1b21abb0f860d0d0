"""Are labels of a trained dictionary better than those of dictionaries that cannot mean anything?

`python -m benchmarks.labels [--preset quickstart] [--out runs/labels]` labels, with the offline labeller,

    trained          the preset's run
    random           the same store, and a dictionary of random rows that has not learned
    data             the same, of rows that lie at activations (train.init_data_weight=1)
    shuffled model   the preset's run on a model whose weights are permuted within every matrix but the embeddings

with detection and fuzzing on held-out contexts, beside labels of other latents. Repeated after a stop, it goes on.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

import sae_dist
from benchmarks.shuffled_model import shuffled_model
from sae_dist import config
from sae_dist.cli.main import main as sae_dist_command
from sae_dist.interpret.read_labels import KINDS
from sae_dist.model.config import ModelConfig

RESULT = Path(__file__).parent / "results/labels.json"
STILL = ("train.tokens=2048", "train.lr=1e-12")


def run(out: Path, *words: str) -> dict[str, Any]:
    """A run with its labels: the figures of both."""
    for command in (
        ("run", f"out={out}", "wandb.mode=disabled", *words), ("pages", str(out), "data=true"), ("label", str(out)),
    ):  # fmt: skip
        if sae_dist_command(list(command)):
            raise SystemExit(f"sae-dist {' '.join(command)} failed")
    scores = sae_dist.labels(out).scores
    figures = json.loads((out / "summary.json").read_text())["eval"]
    return {"fvu": figures["fvu"], "latents": scores["latents"], **{kind: scores[kind] for kind in KINDS}}


def with_store_of(out: Path, other: Path) -> Path:
    """A run's folder in which the store and the text of another are."""
    for part in ("store", "text"):
        if not (out / part).exists():
            shutil.copytree(other / part, out / part)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    options = parser.parse_args()
    preset, out = f"preset={options.preset}", options.out.absolute()
    trained = out / "trained"
    found = {"trained": run(trained, preset)}
    for name, weight in (("random", 0), ("data", 1)):
        own = with_store_of(out / name, trained)
        found[name] = run(own, preset, *STILL, f"train.init_data_weight={weight}")
    own = yaml.safe_load((trained / "config.yaml").read_text())["model"]
    model = shuffled_model(config.load(ModelConfig, own), out / "model")
    found["shuffled model"] = run(out / "shuffled", preset, f"model={model}")
    about = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULT.write_text(json.dumps({"about": about, "preset": options.preset, "results": found}, indent=1) + "\n")
    for name, own in found.items():
        scores = ", ".join(
            f"{kind} {own[kind]['label']['value']:.3f} (labels of others {own[kind]['shuffled']['value']:.3f})"
            for kind in KINDS
        )
        print(f"{name}: FVU {own['fvu']:.3f}, {own['latents']:,} latents, {scores}")


if __name__ == "__main__":
    main()
