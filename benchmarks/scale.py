"""How training scales over processes of one machine, and how near `sae-dist plan machine=here` comes to it.

    python -m benchmarks.scale                  weak and strong scaling, bytes exchanged, time against n_latents
    python -m benchmarks.scale --validate       predicted against measured memory and step time, meshes and sizes

Every configuration is a fresh group of processes over gloo on 127.0.0.1; cores are divided fairly, one thread at least.
Groups alternate, and times are medians over all rounds. The first step of a group is not counted. Two cores cannot be
more than two: the efficiency of R ranks is against min(R, cores) times one rank with one thread.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from sae_kernels.shard import Shard
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import sae_dist.train.loop  # noqa: F401  a rank of a real training has all of it in memory
from sae_dist.config import to_dict
from sae_dist.plan import probe
from sae_dist.plan.memory import memory
from sae_dist.plan.seconds import phases
from sae_dist.plan.traffic import by_name
from sae_dist.plan.workload import Workload
from sae_dist.sae.config import TopK
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.parallel.step import MeshStep

CORES = os.cpu_count() or 1
HOST_PARTS = ("loader", "checkpoint")  # parts of a plan that no rank of this benchmark has
SIZES = (1 << 14, 1 << 16, 1 << 18, 1 << 19, 1 << 20)
MEMORY_GOAL, TIME_GOAL, OVERHEAD_GOAL = 0.05, 0.25, 0.02


class Rank(NamedTuple):
    """What one process measured."""

    seconds: list[float]  # of each step but the first
    processor: list[float]  # processor seconds of the same steps, all threads of this process
    peak_bytes: int
    moved: dict[str, tuple[int, int]]  # calls and bytes of one step
    backend: str


def work_of(n_latents: int, d_model: int, k: int, batch: int, data: int = 1, feature: int = 1) -> Workload:
    sae = TopK(n_latents=n_latents, k=k, k_aux=0)
    return Workload(sae=sae, d_model=d_model, batch=batch, data=data, feature=feature)


def mesh_step(work: Workload, mesh: Mesh) -> MeshStep:
    here = mesh.latents(work.n_latents)
    generator = torch.Generator().manual_seed(here.start)
    W_dec = torch.empty(len(here), work.d_model)
    for rows in W_dec.split(256):  # no second copy while it is made, and little for malloc to keep
        rows.copy_(torch.nn.functional.normalize(torch.randn(rows.shape, generator=generator), dim=1))
    shard = Shard(
        W_dec.clone().t(), W_dec, b_enc=torch.zeros(len(here)), b_dec=torch.zeros(work.d_model),
        k=min(work.k, len(here)), k_aux=0, aux_coefficient=0.0, dead_after_tokens=1 << 40,
    )  # fmt: skip
    return MeshStep(shard, mesh, sae=work.sae, k_aux=0)


def one_step(step: MeshStep, x: torch.Tensor) -> None:
    statistics = step.forward(x, variance=float(x.shape[1]), progress=1.0)
    assert step.gradients_are_finite(statistics)
    step.update_(lr=1e-4)
    step.count_(statistics.fired, tokens=len(x))


def run_rank(rank: int, work: Workload, steps: int, threads: int, port: int, answers: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    config = MeshConfig(data=work.data, feature=work.feature, collective_timeout_s=120)
    store = None
    if work.ranks > 1:
        store = TCPStore("127.0.0.1", port, work.ranks, is_master=rank == 0, timeout=timedelta(seconds=120))
    mesh = connect(config, rank=rank, world=work.ranks, device="cpu", store=store)
    step = mesh_step(work, mesh)
    generator, seconds, processor, before = torch.Generator().manual_seed(7), [], [], {}
    for number in range(steps + 1):
        raw = torch.randn(work.batch, work.d_model, generator=generator).bfloat16()
        before = {name: (m.calls, m.bytes) for name, m in mesh.traffic.items()}
        if mesh.world.group is not None:
            dist.barrier()
        started, processor_started = time.perf_counter(), time.process_time()
        one_step(step, raw.float())
        if mesh.world.group is not None:
            dist.barrier()
        if number:
            seconds.append(time.perf_counter() - started)
            processor.append(time.process_time() - processor_started)
    moved = {
        name: (m.calls - before.get(name, (0, 0))[0], m.bytes - before.get(name, (0, 0))[1])
        for name, m in mesh.traffic.items()
    }
    answers.put((rank, Rank(seconds, processor, _peak(), moved, step.shard.backend_used)))
    mesh.close()


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def group(work: Workload, *, steps: int, threads: int | None = None) -> list[Rank]:
    """A fresh group of processes; rank order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    threads = threads or max(CORES // work.ranks, 1)
    ranks = [
        context.Process(target=run_rank, args=(rank, work, steps, threads, port, answers)) for rank in range(work.ranks)
    ]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=600) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(work.ranks)]


def processor_s(ranks: list[Rank]) -> float:
    """Seconds that a step would take on cores with nothing else to do: what all ranks computed, over the cores."""
    return sum(statistics.median(rank.processor) for rank in ranks) / CORES


def alternating(works: dict[str, tuple[Workload, int | None]], *, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a step of every configuration, and what rank 0 moved beside what the plan says."""
    times: dict[str, list[float]] = {name: [] for name in works}
    computed: dict[str, list[float]] = {name: [] for name in works}
    last: dict[str, Rank] = {}
    for _ in range(rounds):
        for name, (work, threads) in works.items():
            ranks = group(work, steps=steps, threads=threads)
            times[name] += ranks[0].seconds
            computed[name].append(processor_s(ranks))
            last[name] = ranks[0]
    found = {}
    for name, (work, threads) in works.items():
        planned = {key: list(value) for key, value in by_name(work).items()}
        moved = {key: list(value) for key, value in last[name].moved.items() if value[0]}
        found[name] = {
            "n_latents": work.n_latents, "d_model": work.d_model, "k": work.k, "batch": work.batch, "data": work.data,
            "feature": work.feature, "threads": threads or max(CORES // work.ranks, 1),
            "step_s": statistics.median(times[name]), "spread_s": [min(times[name]), max(times[name])],
            "processor_s": statistics.median(computed[name]),
            "bytes": sum(value[1] for value in moved.values()), "bytes_planned": sum(v[1] for v in planned.values()),
            "exchanges_equal": moved == planned, "exchanges": moved, "backend": last[name].backend,
        }  # fmt: skip
        found[name]["tokens_per_second"] = work.batch / found[name]["step_s"]
        sys.stderr.write(f"{name}: {found[name]['step_s']:.3f} s\n")
    return found


def scaling(rounds: int, steps: int) -> dict[str, Any]:
    """Strong: one problem on more ranks. Weak: latents grow with feature ranks, rows with data ranks."""
    meshes = [(1, 1), (1, 2), (2, 1), (1, 3), (1, 4), (2, 2), (4, 1)]
    n, d, k, batch = 16_384, 512, 32, 1_024
    works: dict[str, tuple[Workload, int | None]] = {"one_thread": (work_of(n, d, k, batch), 1)}
    for data, feature in meshes:
        works[f"strong {data}x{feature}"] = (work_of(n, d, k, batch, data, feature), None)
        if (data, feature) != (1, 1):
            works[f"weak {data}x{feature}"] = (work_of(n * feature, d, k, batch * data, data, feature), None)
    found = alternating(works, rounds=rounds, steps=steps)
    one = found["one_thread"]["step_s"]
    computed = found["one_thread"]["processor_s"]
    for name, own in found.items():
        ranks = own["data"] * own["feature"]
        if name.startswith("strong"):
            own["efficiency"] = one / (own["step_s"] * min(max(ranks, own["threads"]), CORES))
            own["processor_efficiency"] = computed / own["processor_s"]
        if name.startswith("weak"):
            own["efficiency"] = one * ranks / (own["step_s"] * min(ranks, CORES))
            own["processor_efficiency"] = computed * ranks / own["processor_s"]
    return found


def sizes(steps: int, largest: int) -> list[dict[str, Any]]:
    """Time of a step against n_latents, over both axes of two ranks and on one; the last fits this machine barely."""
    found = []
    for n in (n for n in SIZES if n <= largest):
        for data, feature in [(1, 1), (1, 2), (2, 1)]:
            work = work_of(n, 512, 32, 512, data, feature)
            if 34 * n * 512 * data + 0.4e9 * work.ranks > 0.9 * psutil.virtual_memory().available:
                continue
            ranks = group(work, steps=steps)
            found.append({
                "n_latents": n, "data": data, "feature": feature, "processor_s": processor_s(ranks),
                "step_s": statistics.median(ranks[0].seconds),
                "peak_bytes_a_rank": max(rank.peak_bytes for rank in ranks),
            })  # fmt: skip
            sys.stderr.write(f"{found[-1]}\n")
    return found


def overhead(rounds: int) -> dict[str, Any]:
    """MeshStep of one rank against the bare Shard, step by step in turns, in one process."""
    work = work_of(16_384, 512, 32, 1_024)
    step = mesh_step(work, Mesh.single())
    bare = mesh_step(work, Mesh.single()).shard
    x = torch.randn(work.batch, work.d_model)
    steps = {"mesh": lambda: one_step(step, x), "bare": lambda: bare.step(x, lr=1e-4, variance=float(work.d_model))}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in sorted(steps, reverse=number % 2 == 1):
            started = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - started)
    medians = {name: statistics.median(own[2:]) for name, own in times.items()}
    ratio = statistics.median(m / b for m, b in zip(times["mesh"][2:], times["bare"][2:], strict=True))
    return {"processor_seconds": medians, "overhead": ratio - 1, "goal": OVERHEAD_GOAL}


VALIDATED = [  # n_latents, d_model, k, batch, data, feature
    (16_384, 512, 32, 1_024, 1, 1), (65_536, 512, 32, 512, 1, 1), (65_536, 256, 16, 2_048, 1, 1),
    (131_072, 384, 32, 512, 1, 1), (32_768, 768, 32, 1_024, 1, 1), (32_768, 768, 32, 1_024, 1, 2),
    (65_536, 512, 32, 1_024, 1, 2), (65_536, 512, 32, 1_024, 2, 1), (49_152, 512, 32, 1_024, 1, 3),
    (65_536, 512, 32, 1_024, 1, 4), (32_768, 512, 32, 2_048, 2, 2), (65_536, 256, 16, 2_048, 4, 1),
    (131_072, 256, 32, 1_024, 1, 2), (131_072, 256, 32, 1_024, 2, 2),
]  # fmt: skip


def validate(steps: int, out: Path, about: dict[str, Any]) -> None:
    """Largest rank's peak memory and median step time beside the plan's, for machine=here; goes on with what is in out.

    Times are compared as processor seconds over cores, which the probe measures too; wall seconds stand beside them.
    """
    result = json.loads(out.read_text()) if out.exists() else about
    machine = probe.here(again="machine_description" not in result)
    result |= {"machine_description": to_dict(machine), "memory_goal": MEMORY_GOAL, "time_goal": TIME_GOAL}
    rows = result.setdefault("cases", [])
    for case in VALIDATED[len(rows) :]:
        work = work_of(*case)
        ranks = group(work, steps=steps)
        planned = sum(p.bytes for p in memory(work, machine) if not p.name.startswith(HOST_PARTS))
        predicted = sum(p.seconds for p in phases(work, machine) if not p.name.endswith("(world)"))  # no loader here
        measured, seconds = max(r.peak_bytes for r in ranks), statistics.median(ranks[0].seconds)
        rows.append({
            "n_latents": work.n_latents, "d_model": work.d_model, "k": work.k, "batch": work.batch, "data": work.data,
            "feature": work.feature, "peak_bytes": measured, "planned_bytes": planned,
            "phases": {phase.name: phase.seconds for phase in phases(work, machine)},
            "memory_error": planned / measured - 1, "step_s": seconds,
            "processor_s": processor_s(ranks), "planned_s": predicted,
            "time_error": predicted / processor_s(ranks) - 1, "wall_error": predicted / seconds - 1,
        })  # fmt: skip
        sys.stderr.write(f"{json.dumps(rows[-1])}\n")
        save(out, result)
    result["memory_within"] = sum(abs(r["memory_error"]) <= MEMORY_GOAL for r in rows)
    result["time_within"] = sum(abs(r["time_error"]) <= TIME_GOAL for r in rows)
    save(out, result)


def save(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=1 << 20, help="latents")
    parser.add_argument("--parts", nargs="+", default=["overhead", "scaling", "sizes"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path("benchmarks/results") / ("plan.json" if arguments.validate else "scale.json")
    machine = {"cores": CORES, "kernel": platform.release(), "memory": psutil.virtual_memory().total}
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "load": os.getloadavg()[0]}
    if arguments.validate:
        validate(arguments.steps, out, result)
        return
    result = json.loads(out.read_text()) if out.exists() else result
    if "overhead" in arguments.parts:
        result["overhead"] = overhead(24)
        save(out, result)
    if "scaling" in arguments.parts:
        result["scaling"] = scaling(arguments.rounds, arguments.steps)
        save(out, result)
    if "sizes" in arguments.parts:
        result["sizes"] = sizes(arguments.steps, arguments.largest)
        save(out, result)


if __name__ == "__main__":
    main()
