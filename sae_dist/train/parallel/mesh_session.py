"""A rank's session in a mesh: rendezvous, heartbeats, and errors that name the ranks that are gone."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from sae_kernels.cpu.build import library
from torch.distributed import DistError, Store  # pyright: ignore[reportPrivateImportUsage]

from sae_dist.config import UserError
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.heartbeat import START_S, Heartbeat, missing_ranks
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.parallel.rendezvous import Rendezvous, connect_store
from sae_dist.train.parallel.watchdog import Watchdog

logger = logging.getLogger(__name__)

NO_MEMORY_WORDS = re.compile("can't allocate memory|not enough memory")
NETWORK = re.compile("gloo|nccl|connection|socket|peer|time[d ]*out", re.IGNORECASE)  # gloo's errors have no type


class PeersLost(RuntimeError):
    """An exchange failed; the message names the ranks without heartbeats and quotes the library."""


class MeshSession(NamedTuple):
    """The mesh, and a function that reports this rank's step and phase."""

    mesh: Mesh
    set_phase: Callable[[int, str], None]


@contextmanager
def mesh_session(
    config: MeshConfig, rendezvous: Rendezvous | None, *, rank: int, world: int, device: str | torch.device = "cpu"
) -> Iterator[MeshSession]:
    """The session of one of `world` processes that all enter it; a world of one needs no rendezvous.

    `device` is this rank's; all ranks use CPUs unless all have a GPU. A failed exchange is raised as PeersLost, after
    four seconds in which missing heartbeats show which ranks are gone. UserError where memory is too small, and where
    data ranks would compute with different kernels or numbers of threads. Other errors are raised as they are.
    """
    device = torch.device(device)
    if rendezvous is None or world == 1:
        yield MeshSession(connect(config, rank=rank, world=world, device=device), lambda *_: None)
        return
    heartbeat, store = Heartbeat(connect_store(rendezvous, START_S), rank), connect_store(rendezvous, START_S)
    try:
        store.set(f"here/{rank}", device.type)
        store.wait(names := [f"here/{other}" for other in range(world)])  # starting may take longer than an exchange
        without = [other for other, name in enumerate(names) if store.get(name) != b"cuda"]
        if device.type == "cuda" and without:
            logger.warning("rank %d has a GPU, but %d of %d ranks have none: all use CPUs", rank, len(without), world)
            device = torch.device("cpu")
        if device.type == "cpu" and config.data > 1:
            _refuse_mixture(store, rank, world)
        mesh = connect(config, rank=rank, world=world, device=device, store=store)
        heartbeat.exchange_s = lambda: sum(traffic.seconds for traffic in list(mesh.traffic.values()))
        with ExitStack() as meanwhile:
            if device.type == "cuda":
                watch = Watchdog(connect_store(rendezvous, START_S), rank, world, config.collective_timeout_s)
                meanwhile.enter_context(closing(watch))
            yield MeshSession(mesh, heartbeat.set_phase)
            heartbeat.done()
        mesh.close()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"rank {rank} needs more memory than its GPU has ({str(error).splitlines()[0][:200]}); use more "
            "mesh.feature ranks, a smaller train.micro_batch or train.batch (sae-dist plan says what they need)"
        ) from None
    except RuntimeError as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        if NO_MEMORY_WORDS.search(said):
            raise UserError(
                f"rank {rank} needs more memory than there is ({said}); use more mesh.feature ranks on more machines, "
                "a smaller train.micro_batch or train.batch (sae-dist plan says what they need)"
            ) from None
        try:
            gone = missing_ranks(connect_store(rendezvous, config.collective_timeout_s), world)
        except RuntimeError:
            gone = "the process that served the rendezvous is gone"
        if gone is None and not (isinstance(error, DistError) or NETWORK.search(str(error))):
            raise  # a bug: it would happen again
        gone = gone or "every rank still answers; the network between them failed"
        raise PeersLost(f"rank {rank} cannot go on: {gone} ({said})") from error
    finally:
        heartbeat.close()


def _refuse_mixture(store: Store, rank: int, world: int) -> None:
    """UserError unless all CPUs use the same kernels and threads: else copies on data ranks would silently diverge."""
    compiled = library()  # its name is a hash of everything that decides its sums
    kernel = "plain torch" if compiled is None else Path(compiled._name).stem
    store.set(f"kernels/{rank}", f"{kernel} on {torch.get_num_threads()} threads")  # torch's sums depend on them
    kernels = [store.get(f"kernels/{other}").decode() for other in range(world)]  # waits for ranks that compile
    other = next((rank for rank, own in enumerate(kernels) if own != kernels[0]), None)
    if other is not None:
        raise UserError(
            f"rank 0 computes with {kernels[0]} and rank {other} with {kernels[other]}, so that copies of the "
            "dictionary would drift apart; use mesh.data=1, or the same processor, compiler, torch and OMP_NUM_THREADS"
        )
