"""A rank's time in a mesh: it meets the others, says once a second how it is, and names who is gone when one is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.meeting import Meeting, join
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.parallel.pulse import START_S, Pulse, who_is_gone


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

    PeersLost in place of what a failed exchange raises: with the ranks that are gone, after four seconds of listening.
    """
    if meeting is None or world == 1:
        yield Joined(connect(config, rank=rank, world=world, device=device), lambda *_: None)
        return
    pulse, store = Pulse(join(meeting, START_S), rank), join(meeting, START_S)
    try:
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(world)])  # starting takes longer than an exchange may
        mesh = connect(config, rank=rank, world=world, device=device, store=store)
        pulse.exchange_s = lambda: sum(moved.seconds for moved in list(mesh.moved.values()))
        yield Joined(mesh, pulse.at)
        mesh.close()
    except RuntimeError as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        gone = who_is_gone(join(meeting, config.collective_timeout_s), world)
        raise PeersLost(f"rank {rank} cannot go on: {gone} ({said[:300]})") from error
    finally:
        pulse.close()
