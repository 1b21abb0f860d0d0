"""Where the processes of a mesh meet: a TCP store, which listens on an address that is said where it is ours."""

import os
import socket
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sae_dist.config import UserError
from sae_dist.network import let_gloo_listen_towards


class Meeting(NamedTuple):
    """A served store, and the part of its names that one attempt uses: what dead ranks left there is never read."""

    host: str
    port: int
    attempt: str


def serve(host: str) -> TCPStore:
    """A store that listens on `host` alone (torch's own would listen on every address of the machine)."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join(meeting: Meeting, timeout_s: float) -> Store:
    """A connection of one's own: a call that waits does not hold up calls on another connection.

    Who meets on the loopback also talks on it: nccl would use any network.
    """
    let_gloo_listen_towards(meeting.host)
    if meeting.host in ("127.0.0.1", "localhost"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timedelta(seconds=timeout_s))
    return PrefixStore(meeting.attempt, store)


def of_torchrun() -> tuple[Meeting, TCPStore | None]:
    """The meeting that torchrun's variables name, and its store where this process is to serve it.

    A restart by torchrun is an attempt of its own: torchrun may keep one store over restarts. UserError for restarts on
    several machines: only that one whose rank died counts them, so that the others would look for each other elsewhere.
    Where none but the variables are torchrun's, rank 0's store listens as torch's own does: MASTER_ADDR may be a name
    that others have for this machine.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            f"torchrun --max-restarts={os.environ['TORCHELASTIC_MAX_RESTARTS']} over several machines cannot bring "
            "ranks together again; use --max-restarts=0 and repeat the command, or train.launcher=actors"
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"
    served = TCPStore(host, port, is_master=True, wait_for_workers=False) if serves else None
    return Meeting(host, port, f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"), served


def names(served: Store, attempt: str) -> Store:
    """What the ranks of one attempt see of a served store."""
    return PrefixStore(attempt, served)
