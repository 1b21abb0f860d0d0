"""One process of a tensor-parallel replica: `python parallel_child.py RANK SIZE FOLDER CONFIG HOOKS`."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sae_dist.config import UserError
from sae_dist.model import parallel
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.parallel.key_value import StoreAddress, StoreServer


def main(rank: int, size: int, folder: Path, config: dict, hooks: list[str]) -> None:
    torch.set_num_threads(1)
    served = StoreServer("127.0.0.1") if rank == 0 else None
    place = folder / "place"
    if served is not None:
        (folder / "place.tmp").write_text(json.dumps(served.address))
        (folder / "place.tmp").rename(place)
    while not place.exists():
        time.sleep(0.02)
    at = StoreAddress(*json.loads(place.read_text()))
    group = parallel.join(rank, size, at=at, device=torch.device("cpu"), served=served)
    try:
        model = load(ModelConfig(**config), group)
    except UserError as error:
        (folder / f"{rank}.json").write_text(json.dumps({"error": str(error)}))
        return
    tokens = torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(1))
    states = model.capture(tokens, hooks)
    save_file({hook: x.contiguous() for hook, x in states.items()}, folder / f"{rank}.safetensors")
    facts = {
        "fingerprint": model.fingerprint,
        "held": parallel.held_bytes(model.model),
        "flop": model.flop_per_token(hooks, 17),
        "peak": int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]
        ),
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]), json.loads(sys.argv[5]))
