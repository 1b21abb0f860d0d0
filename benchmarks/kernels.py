"""A whole TopK training step on this CPU against the bare encoder product, and where its time goes.

    python -m benchmarks.kernels --cache ~/.cache/sae_dist/bench --latents 16384 65536 262144

The bare product is torch's x [batch, d_model] @ W [d_model, n_latents] into an existing output, in bf16 or fp32,
whichever this processor does faster, the better of both memory layouts of W; beyond 65,536 latents, as many products
of 65,536 (it would not fit otherwise). Step and product alternate; every time is the best of its repetitions, in wall
seconds and in processor seconds of all threads (which other programs on the machine disturb less).
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sae_kernels.cpu import kernels
from sae_kernels.cpu.build import cpu_flags
from sae_kernels.shard import Backend, Shard

from benchmarks.activations import load


class Seconds(NamedTuple):
    wall: float
    processor: float


def timed(run: Callable[[], object]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def best(times: list[Seconds]) -> Seconds:
    return Seconds(min(t.wall for t in times), min(t.processor for t in times))


def features() -> list[str]:
    """What this processor has that decides how fast it multiplies."""
    names = ("avx2", "fma", "avx_vnni", "avx512_bf16", "avx512_vnni", "amx")
    return sorted(flag for flag in cpu_flags() if flag.startswith(names))


def faster_dtype(x: torch.Tensor) -> torch.dtype:
    """bf16 or fp32, by a small product: without instructions for it, torch's bf16 is many times slower."""

    def product(dtype: torch.dtype) -> float:
        a, b = x[:512].to(dtype), torch.randn(x.shape[1], 512).to(dtype)
        return min(timed(lambda: torch.mm(a, b)).processor for _ in range(3))

    return min((torch.bfloat16, torch.float32), key=product)


def products(x: torch.Tensor, n_latents: int, dtype: torch.dtype) -> list[Callable[[], object]]:
    """The bare product with W as rows of d_model and as rows of n_latents."""
    part = min(n_latents, 65536)
    x, out = x.to(dtype), torch.empty(len(x), part, dtype=dtype)
    rows = torch.randn(x.shape[1], part).to(dtype)
    columns = rows.t().contiguous().t()

    def product(W: torch.Tensor) -> None:
        for _ in range(n_latents // part):
            torch.mm(x, W, out=out)

    return [partial(product, rows), partial(product, columns)]


def dictionary(
    x: torch.Tensor, n_latents: int, k: int, k_aux: int, backend: Backend, screen: kernels.Screen = "auto"
) -> Shard:
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, x.shape[1]), dim=1)
    return Shard(
        W_dec.t(), W_dec, b_enc=torch.zeros(n_latents), b_dec=x.mean(0), k=k, k_aux=k_aux, aux_coefficient=1 / 32,
        dead_after_tokens=10_000_000, backend=backend, screen=screen,
    )  # fmt: skip


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Processor seconds of every entry point of the compiled library, summed while this lasts."""
    seconds: dict[str, float] = {}
    original = kernels.call

    def call(name: str, *arguments: object) -> int:
        began = time.process_time()
        result = original(name, *arguments)  # type: ignore[arg-type]
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - began
        return result

    kernels.call = call
    try:
        yield seconds
    finally:
        kernels.call = original


def measure(x: torch.Tensor, n_latents: int, arguments: argparse.Namespace) -> dict:
    sae = dictionary(x, n_latents, arguments.k, arguments.k_aux, arguments.backend, arguments.screen)
    variance = x.var(0).sum()
    batches = x.split(arguments.batch)
    dtype = faster_dtype(batches[0])
    bare = products(batches[0], n_latents, dtype) if arguments.product else []
    shares: list[float] = arguments.dead
    product_times: list[list[Seconds]] = [[], []]
    step_times: dict[float, list[Seconds]] = {share: [] for share in shares}
    where: dict[float, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for i in range(arguments.repetitions):
        for product, times in zip(bare, product_times, strict=False):
            times.append(timed(product))
        for share in shares:
            dead = torch.randperm(n_latents, generator=generator)[: int(share * n_latents)]
            sae.tokens_since_fired.zero_()[dead] = 10**9
            with phases() as seconds:
                batch = batches[i % len(batches)]
                step_times[share].append(timed(partial(sae.step, batch, lr=1e-4, variance=variance)))
            where[share] = {name: round(s, 4) for name, s in seconds.items()}
    screened = sae.screened._asdict() if sae.screened else None
    steps = {share: best(times[1:])._asdict() for share, times in step_times.items()}
    for share, own in steps.items():
        own |= {"tokens_per_second": round(arguments.batch / own["wall"]), "processor_seconds_by_phase": where[share]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = sum(t.nbytes for t in sae.state_dict().values())
    result = {"n_latents": n_latents, "state_bytes": state, "peak_bytes": peak, "screened": screened}
    result |= {"step_by_dead_share": steps}
    if not bare:
        return result
    product = min((best(times) for times in product_times), key=lambda t: t.wall)
    for own in steps.values():
        own |= {"ratio": own["wall"] / product.wall, "processor_ratio": own["processor"] / product.processor}
    gflops = 2 * arguments.batch * x.shape[1] * n_latents / product.wall / 1e9
    return result | {"product": product._asdict(), "product_gflops": gflops, "product_dtype": str(dtype)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--latents", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--k-aux", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=576, help="the first dimensions of the activations")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--screen", default="auto")
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.02, 0.1], help="shares of dead latents")
    parser.add_argument("--product", action=argparse.BooleanOptionalAction, default=True, help="without: peak memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    arguments = parser.parse_args()
    rows = np.load(load(arguments.cache), mmap_mode="r")[: 4 * arguments.batch, : arguments.d_model]
    x = torch.tensor(rows).float()
    results = []
    for n_latents in arguments.latents:
        results.append(measure(x, n_latents, arguments))
        sys.stderr.write(f"{json.dumps(results[-1])}\n")
    machine = {"cores": torch.get_num_threads(), "kernel": platform.release(), "load": os.getloadavg()[0]}
    machine["features"] = features()
    sizes = {name: getattr(arguments, name) for name in ("k", "k_aux", "batch", "d_model", "backend", "screen")}
    result = {"machine": machine, "torch": torch.__version__, "sizes": sizes, "results": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
