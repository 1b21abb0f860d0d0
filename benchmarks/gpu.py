"""Every figure of the kernels that needs a GPU, in one run of less than eight minutes: `python benchmarks/gpu.py`.

Needs torch, Triton and numpy, and `kernels` on the PYTHONPATH. First the comparisons of gpu_checks, then the figures,
beside the bare bf16 product, torch's own operations, torch.compile and the processor's limits. A figure that time or
memory did not allow is null with a reason. `--tiny` runs everything once at toy sizes, on a CPU if need be.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: --tiny only
try:
    import jaxtyping  # noqa: F401
except ModuleNotFoundError:  # annotations only; GPU machines often have torch and nothing else
    _Shape = type("_Shape", (), {"__class_getitem__": lambda *_: torch.Tensor})

    class _Shapes(ModuleType):
        def __getattr__(self, name: str) -> type:  # whatever a module imports
            if name.startswith("__"):
                raise AttributeError(name)
            return _Shape

    sys.modules["jaxtyping"] = _Shapes("jaxtyping")

import triton  # noqa: E402
from gpu_checks import checks, dictionary  # noqa: E402
from gpu_usual import usual_step  # noqa: E402
from sae_kernels.triton_latents import ParameterState, WeightedPairs, schedule_row, update_latents_  # noqa: E402
from sae_kernels.triton_select import Buffers, tighten_  # noqa: E402
from sae_kernels.triton_sparse_decode import decode, gather_dot  # noqa: E402
from sae_kernels.triton_sparse_gradient import row_gradient, segments  # noqa: E402
from sae_kernels.triton_tiles import Tile, tile_for  # noqa: E402
from sae_kernels.triton_topk_encode import (  # noqa: E402
    capacity_for,
    encode_select,
    encode_stretch_,
    operands,
    stretches,
)
from triton.runtime.errors import OutOfResources  # noqa: E402

LIMITS = {"H100": (989, 3350), "H200": (989, 4800), "A100": (312, 2039), "B200": (2250, 8000), "MI300X": (1307, 5300)}
CASES = [  # batch, d_model, n_latents, k: ordered so that the ones that matter most come first
    (4096, 768, 65536, 32), (4096, 4096, 65536, 64), (4096, 768, 16384, 32), (4096, 768, 262144, 32),
    (4096, 768, 1048576, 32), (32768, 768, 65536, 32), (4096, 2304, 65536, 64), (4096, 4096, 262144, 64),
    (4096, 768, 65536, 256), (1024, 768, 65536, 32),
]  # fmt: skip
TILES = [  # beside the default, on the first two cases
    Tile(128, 256, 64, 8, 3, 8, True, 1), Tile(128, 256, 64, 8, 3, 8, True, 0), Tile(128, 256, 64, 8, 3, 8),
    Tile(128, 128, 64, 4, 3, 4, True, 2),
]  # fmt: skip
COMPILED = {(4096, 768, 65536, 32), (4096, 768, 16384, 32)}  # torch.compile takes a while on each


class Run:
    """The clock, the device and what has been measured so far."""

    def __init__(self, *, tiny: bool, minutes: float) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tiny, self.deadline = tiny, time.monotonic() + 60 * minutes
        self.figures: list[dict[str, Any]] = []

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Median of a tenth of a second of runs after warming up, the L2 cache flushed between them."""
        if self.tiny or self.device.type == "cpu":
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        return float(triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median"))

    def measure(
        self, name: str, function: Callable[[], object], case: tuple, *, flop: float = 0, moved: float = 0
    ) -> float | None:
        """Record milliseconds, peak memory above what was there, TFLOP/s and GB/s; what cannot be had is a reason."""
        figure: dict[str, Any] = dict(zip(("batch", "d_model", "n_latents", "k"), case, strict=True)) | {"name": name}
        self.figures.append(figure)
        if time.monotonic() > self.deadline:
            figure |= {"ms": None, "reason": "out of time"}
            return None
        before = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            function()
            peak = torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else None
            ms = self.milliseconds(function)
        except (torch.OutOfMemoryError, OutOfResources) as error:  # memory, or a tile that this processor cannot hold
            torch.cuda.empty_cache()
            figure |= {"ms": None, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
            return None
        figure |= {"ms": ms, "peak_bytes": peak, "tflops": flop / ms / 1e9, "gbps": moved / ms / 1e6}
        return ms


def encoder(run: Run, case: tuple[int, int, int, int], *, tiles: bool) -> None:
    """The fused encoder beside the bare product, product + topk and torch.compile of that, and its parts."""
    batch, d_model, n_latents, k = case
    dtype = torch.float32 if run.device.type == "cpu" else torch.bfloat16
    x = torch.randn(batch, d_model, device=run.device).to(dtype)
    W = torch.randn(n_latents, d_model, device=run.device).div_(d_model**0.5).to(dtype)
    b = torch.zeros(n_latents, device=run.device)
    flop, moved = 2.0 * batch * d_model * n_latents, 2.0 * d_model * (batch + n_latents)
    run.measure("encode", lambda: encode_select(x, W, b, k=k), case, flop=flop, moved=moved)
    run.figures[-1]["overflowed_rows"] = int(encode_select(x, W, b, k=k)[2].sum())
    if batch * n_latents <= 1 << 32:
        out = torch.empty(batch, n_latents, dtype=dtype, device=run.device)
        run.measure("bare product", lambda: torch.mm(x, W.T, out=out), case, flop=flop, moved=moved)
        run.measure("torch.topk alone", lambda: out.topk(k), case, moved=2.0 * batch * n_latents)
        del out
        run.measure("product, relu, topk", lambda: torch.mm(x, W.T).relu_().topk(k), case, flop=flop)
    if case in COMPILED:
        compiled = torch.compile(lambda x, W: (x @ W.T).relu().topk(k))
        run.measure("product, relu, topk compiled", lambda: compiled(x, W), case, flop=flop)
    tile, capacity = tile_for(x), capacity_for(k)
    buffers = Buffers(min(batch, 16384), capacity, run.device)
    part = x[:16384]
    spans = stretches(n_latents, k=k, capacity=capacity, block=tile.latents)
    given = operands(part, W, tile)
    for start, stop in spans:  # one pass for real, so that the last stretch and the last tightening see real bounds
        if start == 0:
            buffers.reset()
        last = {"start": start // tile.latents, "stop": -(-stop // tile.latents), "theta": None, "tile": tile}
        encode_stretch_(part, W, b, buffers, given=given, **last)
        if stop < n_latents:
            tighten_(buffers, len(part), k=k)
    rows, width = len(part), spans[-1][1] - spans[-1][0]
    run.measure("tighten", lambda: tighten_(buffers, rows, k=k), case, moved=8.0 * rows * capacity)
    run.measure(
        "encode, last stretch", lambda: encode_stretch_(part, W, b, buffers, given=given, **last), case,
        flop=2.0 * rows * d_model * width,
    )  # fmt: skip
    for other in TILES if tiles else []:
        name = f"encode {tuple(other)}"
        run.measure(name, lambda tile=other: encode_select(x, W, b, k=k, tile=tile), case, flop=flop)


def gathers(run: Run, case: tuple[int, int, int, int]) -> None:
    """Decoder, its backward and both sparse gradients beside torch's own."""
    batch, d_model, n_latents, k = case
    values = torch.rand(batch, k, device=run.device) + 0.1
    indices = torch.randint(n_latents, (batch, k), device=run.device)
    W, x = torch.randn(n_latents, d_model, device=run.device), torch.randn(batch, d_model, device=run.device)
    read = 4.0 * batch * k * d_model
    bag = torch.nn.functional.embedding_bag
    run.measure("decode", lambda: decode(values, indices, W, None), case, moved=read)
    run.measure("embedding_bag", lambda: bag(indices, W, per_sample_weights=values, mode="sum"), case, moved=read)
    run.measure("gather_dot", lambda: gather_dot(x, W, indices), case, moved=read)
    if read < 1 << 34:
        run.measure("gather_dot by einsum", lambda: torch.einsum("bd,bkd->bk", x, W[indices]), case, moved=read)
    half = W.bfloat16()
    run.measure("decode bf16", lambda: decode(values, indices, half, None), case, moved=read / 2)
    by_latent = segments(indices, n_latents=n_latents)
    written = 4.0 * n_latents * d_model
    run.measure("segments", lambda: segments(indices, n_latents=n_latents), case)
    run.measure(
        "row_gradient", lambda: row_gradient(x, values, by_latent, n_latents=n_latents), case, moved=read + written
    )
    out = torch.zeros(n_latents, d_model, device=run.device)
    moments = ParameterState(W, torch.zeros_like(W), torch.zeros_like(W))
    pairs = WeightedPairs(x, values, by_latent)
    schedule = torch.tensor([schedule_row(step=1, lr=1e-4, betas=(0.9, 0.999))], device=run.device)
    norms = torch.empty(n_latents, device=run.device)
    options = {"schedule": schedule, "step": 0, "betas": (0.9, 0.999), "eps": 1e-8, "norms": norms, "unit": True}
    run.measure("update from pairs", lambda: update_latents_(moments, pairs, **options), case, moved=read + 6 * written)
    run.measure("update from gradient", lambda: update_latents_(moments, out, **options), case, moved=7 * written)


def step(run: Run, case: tuple[int, int, int, int]) -> None:
    """A whole optimiser step, AuxK off and on, beside plain torch's."""
    batch, d_model, n_latents, k = case
    x = torch.randn(batch, d_model, device=run.device)
    flop = 2.0 * batch * d_model * n_latents
    for backend in ("triton", "torch"):
        if backend == "torch" and n_latents * batch > 1 << 26:  # seconds a step: the reference, not a rival
            continue
        for dead in (0, n_latents // 20):
            sae = dictionary(n_latents, d_model, run.device, k=k, backend=backend, dead=dead)

            def once(sae: Any = sae, dead: int = dead) -> None:
                sae.step(x, lr=1e-4, variance=float(d_model))
                sae.tokens_since_fired[:dead] = 1 << 40  # the same latents stay dead

            ms = run.measure(f"step {backend}, {dead} dead", once, case, flop=flop)
            if ms:
                run.figures[-1]["tokens_per_second"] = batch / ms * 1e3
                run.figures[-1]["state_bytes"] = sum(t.nbytes for t in sae.state_dict().values())
            del sae, once
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def usual(run: Run, case: tuple[int, int, int, int], *, compiled: bool) -> None:
    """The step as it is usually written, in the fastest ways that torch alone has, beside ours (AuxK off)."""
    batch, d_model, n_latents, k = case
    x = torch.randn(batch, d_model, device=run.device)
    for decoder in ("gather", "dense"):
        for quick in (False, True) if compiled else (False,):
            step = usual_step(n_latents, d_model, run.device, k=k, decoder=decoder, compiled=quick)
            name = f"step torch autograd, {decoder} decoder{', compiled' if quick else ''}"
            ms = run.measure(name, lambda step=step: step(x), case, flop=2.0 * batch * d_model * n_latents)
            if ms:
                run.figures[-1]["tokens_per_second"] = batch / ms * 1e3
            del step
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def machine(run: Run) -> dict[str, Any]:
    """What the figures were measured on, and the limits that they stand beside."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.processor() or "cpu"
    peak = next((limit for part, limit in LIMITS.items() if part in name), None)
    size = 1 << (20 if run.tiny else 30)
    a, b = torch.empty(size // 4, device=run.device), torch.empty(size // 4, device=run.device)
    return {
        "device": name, "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "peak_tflops_bf16": peak and peak[0], "peak_gbps": peak and peak[1],
        "copy_gbps": 2 * size / run.milliseconds(lambda: b.copy_(a)) / 1e6,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing new after this long")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, every figure once")
    arguments = parser.parse_args()
    run = Run(tiny=arguments.tiny, minutes=arguments.minutes)
    if run.device.type == "cpu" and not arguments.tiny:
        parser.error("no GPU here; --tiny runs the script at toy sizes on a CPU")
    began, outcomes = time.monotonic(), {}
    for name, check in checks(run.device, tiny=arguments.tiny):
        try:
            check()
            outcomes[name] = "ok"
        except (AssertionError, RuntimeError) as error:  # a wrong result or a launch that failed is a finding
            outcomes[name] = f"{type(error).__name__}: {str(error)[:500]}"
    result: dict[str, Any] = {"machine": machine(run), "checks": outcomes, "figures": run.figures}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate([(8, 16, 64, 2)] if arguments.tiny else CASES):
        if time.monotonic() > run.deadline:
            run.figures.append({"case": case, "ms": None, "reason": "out of time"})
            continue
        encoder(run, case, tiles=number < 2 and not arguments.tiny)
        gathers(run, case)
        step(run, case)
        if case[2] * case[0] <= 1 << 29:
            usual(run, case, compiled=case in COMPILED)
        result["seconds"] = time.monotonic() - began
        arguments.out.write_text(json.dumps(result, indent=1))  # after every case: a run cut short leaves its figures
    sys.stdout.write(json.dumps({"checks": outcomes, "figures": len(run.figures), "out": str(arguments.out)}) + "\n")
    return int(any(outcome != "ok" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
