"""A small training of two dictionaries as a command, and what W&B has of it."""

from pathlib import Path

from tests.monitor.wandb_files import Kept, kept


def command(store: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", f"store={store}", f"out={out}", "sae=batchtopk", "sae.n_latents=97", "sae.k=4", "train.steps=60",
        "train.batch=64", "train.init_rows=256", "train.log_every=5", "sae.dead_after_tokens=1000",
        "more_dictionaries=[{n_latents: 160, name: wide}]", *more,
    ]  # fmt: skip


def runs(out: Path) -> dict[str, Kept]:
    """What W&B has in the folder, by name; of a run that it has twice, the newer."""
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=_begun)
    return {found.name: found for found in map(kept, files)}


def _begun(path: Path) -> tuple[str, int]:
    """When a folder was made: its name tells the second."""
    return path.parent.name[:27], path.parent.stat().st_mtime_ns


def figures(entry: dict) -> dict:
    """A line of W&B's history without what W&B adds."""
    return {name: value for name, value in entry.items() if name == "_step" or not name.startswith("_")}
