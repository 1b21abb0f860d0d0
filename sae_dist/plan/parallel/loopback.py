"""How fast the processes of this machine exchange tensors: gloo over loopback, two ranks, two sizes.

Processor seconds of the ranks: on one machine an exchange is copies, and other programs disturb the clock more.
"""

import os
import socket
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
SMALL, LARGE, REPEAT = 16, 1 << 24, 9
RANKS = 2


class Exchanged(NamedTuple):
    """Median processor seconds of one rank in an all-gather."""

    small_s: float
    large_s: float
    large_bytes: int  # received by one rank


def exchanged() -> Exchanged:
    """Starts two processes that gather from one another; about five seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, port, answers), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0, f"a probing process ended with {process.exitcode}"
    small_s, large_s = answers.get()
    return Exchanged(small_s, large_s, (RANKS - 1) * LARGE)


def _rank(rank: int, port: int, answers: "torch.multiprocessing.SimpleQueue") -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    best = [_seconds(size) for size in (SMALL, LARGE)]
    if rank == 0:
        answers.put(best)
    dist.barrier()
    dist.destroy_process_group()


def _seconds(size: int) -> float:
    mine, out = torch.zeros(size, dtype=torch.uint8), torch.empty(RANKS * size, dtype=torch.uint8)
    times = []
    for _ in range(REPEAT):
        dist.barrier()
        started = time.process_time()
        all_gather(out, mine)
        times.append(time.process_time() - started)
    return sorted(times)[REPEAT // 2]
