"""Measures this machine by steps of a few shapes and an exchange; the result is cached in the user's cache folder."""

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from sae_kernels.cpu.build import cpu_flags
from sae_kernels.shard import Shard

from sae_dist.cache_folder import CURE, cache_folder
from sae_dist.config import digest, load, to_dict
from sae_dist.plan.fit import TimedStep, rates
from sae_dist.plan.machine import Link, Machine
from sae_dist.plan.parallel import loopback
from sae_dist.plan.workload import Workload
from sae_dist.run_files import write_json
from sae_dist.sae.config import TopK

logger = logging.getLogger(__name__)

VERSION = 1  # of the measurement; caches of another version are not used
SHAPES = (  # n_latents, d_model, k, batch: every kind of work dominates in one of them
    (8_192, 512, 32, 1_024),
    (16_384, 128, 8, 1_024),
    (2_048, 512, 64, 2_048),
    (32_768, 256, 8, 128),
    (16_384, 768, 16, 256),
    (4_096, 128, 64, 2_048),
    (256, 64, 4, 64),
)
REPEAT = 5
_RANK = """
import psutil, torch, sae_dist.train.loop as _
from sae_kernels.shard import Shard
W = torch.eye(64)
step = Shard(W, W, b_enc=W[0], b_dec=W[0], k=4, k_aux=0, aux_coefficient=0.0, dead_after_tokens=9)
step.step(W, lr=1e-4, variance=1.0)
print(psutil.Process().memory_info().rss)
"""


def here(*, again: bool = False) -> Machine:
    """The description of this machine, measured once in half a minute; `again` ignores the cache."""
    kept = _file()
    if kept.exists() and not again:
        return load(Machine, json.loads(kept.read_text()))
    logger.info("measuring this machine, about half a minute; keep it idle (%s)", kept)
    machine = measure()
    keep(machine)
    return machine


def keep(machine: Machine) -> None:
    """Keeps the description of this machine for the next plan; only a warning where it cannot be written."""
    path = _file()
    try:
        write_json(path, to_dict(machine))
    except OSError as error:
        logger.warning("the measurement cannot be kept in %s (%s); %s", path.parent, error.strerror, CURE)


def measure() -> Machine:
    """Measures steps, an exchange and a process; other running programs distort the result."""
    measured = list(_steps())
    backend = step_of(*SHAPES[-1][:3]).backend_used
    assert backend in ("cpu", "torch"), "a machine with a GPU is described in conf/machine"
    exchanged = loopback.exchanged()
    # a rank's processor seconds, times the ranks, over the cores that they share: seconds of the machine
    per_byte = (exchanged.large_s - exchanged.small_s) / exchanged.large_bytes / torch.get_num_threads()
    link = Link(bytes_per_s=1 / max(per_byte, 1e-12), latency_s=loopback.RANKS * exchanged.small_s)
    memory = float(psutil.virtual_memory().total)
    notes = {
        "gemm_fp32": _gemm(torch.float32), "gemm_bf16": _gemm(torch.bfloat16), "copy": _copy(),
    }  # fmt: skip
    runtime = float(subprocess.run([sys.executable, "-c", _RANK], capture_output=True, text=True, check=True).stdout)
    return Machine(
        name="here", backend=backend, devices=1, memory=memory, host_memory=memory, runtime=runtime,
        rates=rates(measured, backend), link=link, network=link, read=1e9,
        harvest=0.5 * max(notes["gemm_fp32"], notes["gemm_bf16"]), notes=notes,
        source=f"measured on {platform.node()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )  # fmt: skip


def _steps() -> Iterator[TimedStep]:
    for n_latents, d_model, k, batch in SHAPES:
        step = step_of(n_latents, d_model, k)
        run = partial(step.step, torch.randn(batch, d_model), lr=1e-4, variance=float(d_model))
        times = [_timed(run) for _ in range(REPEAT)]
        work = Workload(sae=TopK(n_latents=n_latents, k=k, k_aux=0), d_model=d_model, batch=batch)
        yield TimedStep(work, sorted(times[1:])[(REPEAT - 1) // 2])


def _gemm(dtype: torch.dtype) -> float:
    """FLOP/s of a plain product."""
    a, b, size = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype), 2 * 1024**3
    return size / min(_timed(lambda: a @ b) for _ in range(REPEAT))


def _copy() -> float:
    """Bytes/s read and written by a copy larger than any cache."""
    source = torch.ones(1 << 27, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_timed(lambda: target.copy_(source)) for _ in range(REPEAT))


def _timed(run: Callable[[], object]) -> float:
    """Processor seconds over threads: wall seconds, less what other programs take away."""
    started = time.process_time()
    run()
    return (time.process_time() - started) / torch.get_num_threads()


def step_of(n_latents: int, d_model: int, k: int) -> Shard:
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, d_model), dim=1)
    return Shard(
        W_dec.t(), W_dec, b_enc=torch.zeros(n_latents), b_dec=torch.zeros(d_model), k=k, k_aux=0, aux_coefficient=0.0,
        dead_after_tokens=1 << 40,
    )  # fmt: skip


def _file() -> Path:
    """The cache file for this machine, number of threads and versions."""
    known = [VERSION, torch.__version__, torch.get_num_threads(), platform.node(), sorted(cpu_flags())]
    return cache_folder() / "machines" / f"{digest(known)[:16]}.json"
