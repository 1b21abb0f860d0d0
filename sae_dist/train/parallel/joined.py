"""A rank's time in a mesh: it meets the others, says once a second how it is, and names who is gone when one is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

import torch

from sae_dist.config import UserError
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.meeting import Meeting, join
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.parallel.pulse import START_S, Pulse, who_is_gone
from sae_dist.train.parallel.watch import Watch

logger = logging.getLogger(__name__)


class PeersLost(RuntimeError):
    """An exchange failed; says which ranks are not heard any more, and what the library said."""


class Joined(NamedTuple):
    """The mesh, and whom to tell where this rank is: the step and what it does."""

    mesh: Mesh
    at: Callable[[int, str], None]


@contextmanager
def joined(
    config: MeshConfig, meeting: Meeting | None, *, rank: int, world: int, device: str | torch.device = "cpu"
) -> Iterator[Joined]:
    """One of `world` processes that all do this, for as long as the context lasts; a world of one meets nobody.

    `device` is what this rank has; they take CPUs unless all have a GPU. PeersLost in place of what a failed exchange
    raises: with the ranks that are gone, after four seconds of listening. UserError where a GPU's memory is too small.
    """
    device = torch.device(device)
    if meeting is None or world == 1:
        yield Joined(connect(config, rank=rank, world=world, device=device), lambda *_: None)
        return
    pulse, store = Pulse(join(meeting, START_S), rank), join(meeting, START_S)
    try:
        store.set(f"here/{rank}", device.type)
        store.wait(names := [f"here/{other}" for other in range(world)])  # starting takes longer than an exchange may
        without = [other for other, name in enumerate(names) if store.get(name) != b"cuda"]
        if device.type == "cuda" and without:
            logger.warning("rank %d has a GPU, but %d of %d ranks have none: all use CPUs", rank, len(without), world)
            device = torch.device("cpu")
        mesh = connect(config, rank=rank, world=world, device=device, store=store)
        pulse.exchange_s = lambda: sum(moved.seconds for moved in list(mesh.moved.values()))
        with ExitStack() as meanwhile:
            if device.type == "cuda":
                watch = Watch(join(meeting, START_S), rank, world, config.collective_timeout_s)
                meanwhile.enter_context(closing(watch))
            yield Joined(mesh, pulse.at)
            pulse.done()
        mesh.close()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"rank {rank} needs more memory than its GPU has ({str(error).splitlines()[0][:200]}); use more "
            "mesh.feature ranks, a smaller train.micro_batch or train.batch (sae-dist plan says what they need)"
        ) from None
    except RuntimeError as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        gone = who_is_gone(join(meeting, config.collective_timeout_s), world)
        raise PeersLost(f"rank {rank} cannot go on: {gone} ({said[:300]})") from error
    finally:
        pulse.close()
