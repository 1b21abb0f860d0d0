"""Hashes of small trainings: run it before and after a change that must not move a bit, and compare what it prints.

    python -m tests.train.golden > before.txt

Each line is one training: its name, the order of its rows, its finished dictionaries, all tensors of its last
checkpoint. The hashes hold for one processor and one torch, so they are compared and never stored.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from sae_dist import storage
from sae_dist.sae.config import BatchTopK, SAEConfig, TopK
from sae_dist.shards import stores
from sae_dist.shards.hooks import Hooks
from sae_dist.train import checkpoint, loop
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.config import MeshConfig, TrainConfig
from sae_dist.train.members import MAIN, Member
from sae_dist.train.parallel.mesh import connect
from sae_dist.train.task import Task
from tests.processes import PROCESSES
from tests.train.test_loop import CONFIG, ORDER, full_store

KINDS: dict[str, SAEConfig] = {
    "topk": TopK(n_latents=97, k=4, dead_after_tokens=1000),
    "batchtopk": BatchTopK(n_latents=97, k=4, dead_after_tokens=1000, rows_fraction=0.0),
}
PLAIN = dataclasses.replace(CONFIG, init_data_weight=0.0)  # what follows from no default that is tuned
MORE = (
    Member("wide", TopK(n_latents=131, k=6, dead_after_tokens=1000), seed=1, lr=1e-3),
    Member("batches", BatchTopK(n_latents=64, k=3, dead_after_tokens=500, rows_fraction=0.0), seed=2),
    Member("compact", TopK(n_latents=97, k=4, dead_after_tokens=1000), 0, None, "bfloat16_stochastic", "int8"),
    Member("factored", KINDS["batchtopk"], 0, None, "float32", "factored"),
)


class Golden(NamedTuple):
    """One training to hash."""

    name: str
    data: int
    feature: int
    sae: SAEConfig
    config: TrainConfig
    more: tuple[Member, ...] = ()


def given(member: Member) -> Member:
    """The member with a rate of its own, so that a change of the default rate moves no bit."""
    return member._replace(lr=member.lr or 2e-4 / (member.sae.n_latents / 2**14) ** 0.5)


def trainings() -> list[Golden]:
    found = []
    for data, feature in ((1, 1), (1, 2), (2, 2)):
        for product in ("float32", "bfloat16"):
            config = dataclasses.replace(PLAIN, product=product)
            for kind, sae in KINDS.items():
                found.append(Golden(f"{kind}-{product}-{data}x{feature}", data, feature, sae, config))
        several = dataclasses.replace(PLAIN, micro_batch=20, clip_norm=0.5)
        found.append(Golden(f"several-{data}x{feature}", data, feature, KINDS["topk"], several, MORE))
    clipped = dataclasses.replace(PLAIN, clip_norm=0.05)
    return [*found, Golden("clipped-1x1", 1, 1, KINDS["topk"], clipped)]


def rank_of(golden: Golden, folder: Path, rank: int) -> None:
    """One rank of a training, into folder/NAME."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    world = golden.data * golden.feature
    config = MeshConfig(data=golden.data, feature=golden.feature, collective_timeout_s=120)
    meeting = None if world == 1 else dist.FileStore(str(folder / f"meeting-{golden.name}"), world)
    mesh = connect(config, rank=rank, world=world, device="cpu", store=meeting)
    members = tuple(given(member) for member in (Member(MAIN, golden.sae, 0), *golden.more))
    task = Task(
        stores.open(storage.open(str(folder / "store"))), Hooks(("x",)), config=golden.config, order=ORDER, seed=0,
        members=members, out=folder / golden.name,
    )  # fmt: skip
    loop.train(task, mesh, log=lambda *_: None)
    mesh.close()


def hashes(golden: Golden, folder: Path) -> str:
    """The line of a finished training."""
    out = folder / golden.name
    order = json.loads((out / "dictionary" / "config.json").read_text())["order_hash"]
    weights = hashlib.sha256()
    for file in sorted(out.glob("dictionar*/**/dictionary.safetensors")):
        weights.update(file.read_bytes())
    place = storage.open(str(out / "checkpoints"))
    saved = checkpoint.read(place, folders(place)[0])
    state = hashlib.sha256()
    for name, tensor in sorted(saved.tensors.items()):
        whole = tensor.local if isinstance(tensor, checkpoint.OwnedRows) else tensor
        state.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        state.update(whole.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{golden.name} {order} {weights.hexdigest()[:16]} {state.hexdigest()[:16]}"


def main(only: str = "") -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        full_store(folder / "store")
        for golden in trainings():
            if only not in golden.name:
                continue
            ranks = range(golden.data * golden.feature)
            processes = [PROCESSES.Process(target=rank_of, args=(golden, folder, rank)) for rank in ranks]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            assert [process.exitcode for process in processes] == [0] * len(ranks), golden.name
            print(hashes(golden, folder), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
