"""Where the processes of a mesh meet: a store that one of them, or the driver, serves to those who have its secret."""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from torch.distributed import DistStoreError, Store  # pyright: ignore[reportPrivateImportUsage]

from sae_dist.config import UserError
from sae_dist.network import is_ours, let_gloo_listen_towards
from sae_dist.parallel.key_value import PrefixedStore, StoreAddress, StoreClient, StoreServer

FILE = ".rendezvous"  # in the run's folder: how ranks of torchrun hear of the secret
LOOK_S = 0.2


class Rendezvous(NamedTuple):
    """A served store, and the part of its names that one attempt uses: what dead ranks left there is never read."""

    at: StoreAddress
    attempt: str


def serve(host: str) -> StoreServer:
    """A store that listens on `host` alone."""
    return StoreServer(host)


def connect_store(rendezvous: Rendezvous, timeout_s: float) -> Store:
    """A connection of one's own: a call that waits does not hold up calls on another connection.

    Who meets on the loopback also talks on it: nccl would use any network.
    """
    let_gloo_listen_towards(rendezvous.at.host)
    if rendezvous.at.host in ("127.0.0.1", "localhost"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return PrefixedStore(StoreClient(rendezvous.at, timeout_s), rendezvous.attempt)


def attempt_store(served: StoreServer, attempt: str) -> Store:
    """What the ranks of one attempt see of a served store."""
    return PrefixedStore(served, attempt)


@contextmanager
def torchrun_rendezvous(out: Path, timeout_s: float) -> Iterator[Rendezvous]:
    """The meeting of ranks that torchrun started, for as long as the context lasts; rank 0 serves its store.

    torchrun's own store takes words from everybody who reaches it, so it is not used. The ranks find each other by a
    file in `out`, a folder that all of them see, which only this user may read. UserError for restarts on several
    machines: only that one whose rank died counts them, so that the others would look for each other elsewhere.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            f"torchrun --max-restarts={os.environ['TORCHELASTIC_MAX_RESTARTS']} over several machines cannot bring "
            "ranks together again; use --max-restarts=0 and repeat the command, or train.launcher=actors"
        )
    given = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    start, path = [os.environ.get(name, "") for name in given], out / FILE
    if os.environ["RANK"] != "0":
        yield Rendezvous(_found(path, start, timeout_s), "ranks")
        return
    with closing(serve(_host_of_rank_0())) as served:
        at = served.address
        if at.host == "0.0.0.0":
            at = at._replace(host=os.environ["MASTER_ADDR"])
        _publish(path, {"start": start, "at": at})
        try:
            yield Rendezvous(at, "ranks")
        finally:
            path.unlink(missing_ok=True)


def _host_of_rank_0() -> str:
    """Where rank 0 listens: the loopback where all ranks are on its machine, else the address that others have for it.

    That is every address where MASTER_ADDR is a name that this machine has for its loopback, or none of its own.
    """
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return "127.0.0.1"
    address = socket.gethostbyname(os.environ["MASTER_ADDR"])
    return address if is_ours(address) and not address.startswith("127.") else "0.0.0.0"


def _publish(path: Path, record: dict[str, object]) -> None:
    """Writes the file whole, for this user's eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{FILE}.{secrets.token_hex(4)}")
    with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(record, file)
    part.replace(path)


def _found(path: Path, start: list[str], timeout_s: float) -> StoreAddress:
    """What rank 0 of this start published and serves; a file that an earlier start left is passed over."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["start"] == start:
                at = StoreAddress(*record["at"])
                StoreClient(at, timeout_s)
                return at
        except (FileNotFoundError, DistStoreError):
            pass
        time.sleep(LOOK_S)
    raise UserError(
        f"rank 0 did not say within {timeout_s:.0f} s in {path} where it is; give all ranks the same out=, in a folder "
        "that all their machines see"
    )
