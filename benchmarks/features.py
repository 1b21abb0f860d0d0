"""Feature data of a million latents: seconds, peak memory, and what reading one latent and serving them costs.

`python -m benchmarks.features [--latents N] [--rows N] [--folder DIR]`. Activations, text and output weights are made
up, so no model is needed; all else is what `sae-dist pages RUN data=true` does. Each size has a process of its own, so
its peak memory is its own. `sae-dist serve` is asked what a browser asks when it opens the list and a latent.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_kernels import Active
from torch import Tensor

from sae_dist.interpret.collect import PagesConfig
from sae_dist.interpret.features import write_features
from sae_dist.interpret.logit_effect import Unembedding
from sae_dist.interpret.read_features import Features

RESULT = Path(__file__).parent / "results/features.json"
D_MODEL, VOCAB, K, CONTEXT, BATCH = 16, 4096, 32, 128, 8192
READS = 50  # latents that are read, one at a time
OPENING_S = 3.0  # until somebody has opened the address that the server prints
LIST = ("facts", "overview", "selection?sort=max&dir=desc")
OPENED = {  # what a browser asks, by what its user does
    "list": LIST,
    "search": ("selection?q=12&sort=density&dir=desc",),
    "whole_token": ("selection?q=%221234%22",),
    "further_rows": ("rows?sort=max&dir=desc&from=5000&to=5100",),
}


class MadeUp:
    """Text: a hash of the document and the position says the token, one of the document the category."""

    context = CONTEXT

    def category(self, doc: int) -> str | None:
        return f"kind {doc % 8}"

    def locate(self, doc: int, pos: int) -> tuple[int, int]:
        return doc, pos

    def window(self, doc: int, pos: int, before: int, after: int) -> tuple[np.ndarray, int]:
        first = max(0, pos - before)
        return (doc * 7919 + np.arange(first, pos + after + 1) * 104729) % VOCAB, pos - first


def stream(rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches whose x says where in the stream they are; `encode` makes activations of it."""
    for start in range(0, rows, BATCH):
        at = torch.arange(start, min(start + BATCH, rows))
        yield at[:, None].float(), at // CONTEXT, at % CONTEXT


def measure(latents: int, rows: int, folder: Path) -> dict[str, Any]:
    """Writes the feature data and reads some of it."""

    def encode(x: Tensor) -> Active:
        """K latents a row, frequent ones of low number: densities as uneven as those of a real dictionary."""
        chance = torch.Generator().manual_seed(int(x[0, 0]))
        slots = torch.rand(len(x), K, generator=chance).pow(2)
        indices = ((slots + torch.arange(K)) * (latents // K)).long()
        values = 1 + torch.randn(len(x), K, generator=chance).abs()
        return Active(values.flatten(), indices.flatten(), torch.arange(len(x) + 1) * K)

    chance = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(latents, D_MODEL, generator=chance), torch.randn(D_MODEL, VOCAB, generator=chance)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    out = write_features(
        folder, lambda: stream(rows), encode=encode, W_dec=W_dec, outputs=Unembedding(W_U, torch.arange(VOCAB)),
        stream=MadeUp(), decode=lambda token: f" {token}", vocabulary=range(VOCAB), about={},
        config=PagesConfig(tokens=rows),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, files = Features(out), [path.stat().st_size for path in out.iterdir()]
    began = time.perf_counter()
    for latent in range(0, latents, latents // READS):
        found.read([latent])
    return {
        "latents": latents, "rows": rows, "firings": rows * K, "seconds": round(seconds, 1),
        "peak_bytes": peak * 1024, "peak_before_bytes": before * 1024, "files": len(files), "bytes": sum(files),
        "read_one_ms": round((time.perf_counter() - began) / READS * 1e3, 2), "served": served(folder, latents),
    }  # fmt: skip


def served(folder: Path, latents: int) -> dict[str, Any]:
    """Milliseconds until all that is asked for has arrived, one question after another, and the server's memory."""
    (folder / "status.json").write_text("{}")  # a run
    with server(folder) as (took, _):
        found = {"list_at_once": took(*LIST)}
    with server(folder) as (took, pid):
        time.sleep(OPENING_S)
        found |= {"first_list": took(*LIST)} | {name: took(*questions) for name, questions in OPENED.items()}
        opened = [took("facts", f"latents/{latent}") for latent in range(0, latents, latents // READS)]
        found |= {"latent": statistics.median(opened), "slowest_latent": max(opened)}
        peak = int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return {f"{name}_ms": round(value, 1) for name, value in found.items()} | {"peak_bytes": peak}


@contextmanager
def server(folder: Path) -> Iterator[tuple[Callable[..., float], int]]:
    """A server that has just started: what asks it questions and says how long that took, and its process."""
    command = [sys.executable, "-m", "sae_dist", "serve", str(folder), "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip().rpartition(": ")[2].rstrip("/")

        def took(*questions: str) -> float:
            began = time.perf_counter()
            for question in questions:
                with urllib.request.urlopen(f"{url}/features/data/{question}") as answer:
                    answer.read()
            return (time.perf_counter() - began) * 1e3

        yield took, process.pid
        process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs="+", default=[1 << 14, 1 << 20])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="on a disk with room; removed at the end")
    options = parser.parse_args()
    results = []
    for latents in options.latents:
        folder = Path(tempfile.mkdtemp(prefix="features-", dir=options.folder))
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (latents, options.rows, folder)))
        finally:
            shutil.rmtree(folder)
        print(json.dumps(results[-1]), flush=True)
    about = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULT.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
