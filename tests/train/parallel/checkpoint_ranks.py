"""What each of several processes does for test_checkpoint.py."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.train import checkpoint as plain
from sae_dist.train import retention
from sae_dist.train.checkpoint import Checkpoint, OwnedRows
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints

N = 13
RUN_ID = "1f2e3d4c"


def whole(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tensors = {"W": torch.randn(N, 5, generator=generator), "silent": torch.randint(100, (N,), generator=generator)}
    return tensors | {"b_dec": torch.randn(5, generator=generator), "steps": torch.tensor(step)}


def mine(mesh: Mesh):
    return lambda name, laid: mesh.latents(N) if name in ("W", "silent") else None


def shard(mesh: Mesh, step: int) -> Checkpoint:
    rows = mesh.latents(N)
    held = whole(step)
    for name in ("W", "silent"):
        held[name] = OwnedRows(held[name][rows.start : rows.stop], rows.start, N)  # type: ignore[assignment]
    return Checkpoint(step, held, {"scale": 0.5})


def holds(read: Checkpoint | None, mesh: Mesh, step: int) -> bool:
    assert read is not None
    wanted = shard(mesh, step)
    same = (read.step, read.facts, read.tensors.keys()) == (wanted.step, wanted.facts, wanted.tensors.keys())
    for name, part in wanted.tensors.items():
        got = read.tensors[name]
        if isinstance(part, OwnedRows):
            assert isinstance(got, OwnedRows)
            same &= got[1:] == part[1:] and torch.equal(got.local, part.local)
        else:
            same &= torch.equal(got, part)
    return same


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    plain.FILE_BYTES = 48  # two rows of W
    place, told = storage.open(folder / "checkpoints"), {}
    shared = dist.FileStore(str(folder / "store"), world)
    for number, (data, feature) in enumerate([(world, 1), (1, world), *([(2, 2)] if world == 4 else [])]):
        mesh = connect(
            MeshConfig(data=data, feature=feature), rank=rank, world=world, device="cpu",
            store=dist.PrefixStore(str(number), shared),
        )  # fmt: skip
        checkpoints = Checkpoints(mesh, place, RUN_ID, timeout_s=60)
        previous = checkpoints.latest(mine(mesh))
        told[f"{data}x{feature} reads"] = holds(previous, mesh, 5 if number == 0 else 6 + number - 1)
        checkpoints.save(shard(mesh, 6 + number))
        dist.barrier()
        told[f"{data}x{feature} reads its own"] = holds(checkpoints.latest(mine(mesh)), mesh, 6 + number)
        if rank == world - 1:
            os.environ["SAE_DIST_FAULTS"] = json.dumps(
                [{"point": "checkpoint.before_file", "action": "raise", "nth": 0}]
            )
        try:
            checkpoints.save(shard(mesh, 100 + number))
        except UserError as error:
            told[f"{data}x{feature} fails"] = str(error)
        os.environ.pop("SAE_DIST_FAULTS", None)
        dist.barrier()
        newest = checkpoints.save(shard(mesh, 200 + number))
        dist.barrier()
        if mesh.is_rank_0:
            torn = folder / "checkpoints" / newest / "rank00000-00000.safetensors"
            torn.write_bytes(torn.read_bytes()[:-1])
        dist.barrier()
        read = checkpoints.latest(mine(mesh))
        told[f"{data}x{feature} passes over damage"] = holds(read, mesh, 6 + number)
        dist.barrier()
        if mesh.is_rank_0:
            retention.remove(place, newest)
        dist.barrier()
        mesh.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
