"""The rendezvous of a mesh: a key-value store that the driver or rank 0 serves to processes with its secret."""

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

FILE = ".rendezvous"  # in the run's folder: tells ranks of torchrun the address and the secret
LOOK_S = 0.2


class Rendezvous(NamedTuple):
    """The address of a store, and the prefix of one attempt's keys, so that keys of dead ranks are never read."""

    at: StoreAddress
    attempt: str


def serve(host: str) -> StoreServer:
    """Starts a store that listens on `host` only."""
    return StoreServer(host)


def connect_store(rendezvous: Rendezvous, timeout_s: float) -> Store:
    """A new connection to the store: a call that waits does not block other connections.

    Also restricts gloo and nccl to the interface of the rendezvous.
    """
    let_gloo_listen_towards(rendezvous.at.host)
    if rendezvous.at.host in ("127.0.0.1", "localhost"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return PrefixedStore(StoreClient(rendezvous.at, timeout_s), rendezvous.attempt)


def attempt_store(served: StoreServer, attempt: str) -> Store:
    """The keys of one attempt in a served store."""
    return PrefixedStore(served, attempt)


@contextmanager
def torchrun_rendezvous(out: Path, timeout_s: float) -> Iterator[Rendezvous]:
    """The rendezvous of ranks that torchrun started; rank 0 serves its store while the context lasts.

    torchrun's own store accepts anybody who reaches it, so it is not used. Ranks find the address in a file in `out`,
    a folder that all of them see; only this user may read the file. UserError for restarts on several machines, since
    only the machine whose rank died counts them.
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
    """The address that rank 0 listens on: the loopback if all ranks are on its machine, else MASTER_ADDR.

    All addresses where MASTER_ADDR resolves to the loopback, or to none of this machine's addresses.
    """
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return "127.0.0.1"
    address = socket.gethostbyname(os.environ["MASTER_ADDR"])
    return address if is_ours(address) and not address.startswith("127.") else "0.0.0.0"


def _publish(path: Path, record: dict[str, object]) -> None:
    """Writes the file atomically, readable by this user only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{FILE}.{secrets.token_hex(4)}")
    with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(record, file)
    part.replace(path)


def _found(path: Path, start: list[str], timeout_s: float) -> StoreAddress:
    """The address that rank 0 of this start published; files of earlier starts are ignored."""
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
