"""Producers and consumers of a growing store keep in step: nobody runs ahead without bound, nothing is deleted early.

A consumer tells in consumers/<name>.json how many units it is through with (its credits) and how many it had finished
when it last saved a checkpoint. A producer waits while the store is too far ahead. Retention deletes data only past
what every consumer has saved.
"""

import logging
import threading
import time
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.shards import format
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage

logger = logging.getLogger(__name__)
POLL_S = 0.5


class Position(NamedTuple):
    """Units of the first pass that a consumer is through with (`Batch.units_done`), now and at its last checkpoint."""

    consumer: str
    taken: int
    saved: int


class Credit(NamedTuple):
    """What a producer learnt: seconds it was blocked, and by which consumer ('' if by none)."""

    blocked_s: float
    slowest: str


def report(storage: Storage, position: Position) -> None:
    """Registers the consumer, or moves it forward."""
    if not 0 <= position.saved <= position.taken:
        raise UserError(f"consumer={position.consumer}: saved={position.saved} is beyond taken={position.taken}")
    storage.write(_key(position.consumer), format.seal(position._asdict()))


def sign_off(storage: Storage, consumer: str) -> None:
    """The consumer is done; nothing is kept for it any more and nobody waits for it."""
    storage.delete(_key(consumer))


def positions(storage: Storage) -> list[Position]:
    """Every registered consumer."""
    found = []
    for entry in storage.list("consumers/"):
        try:
            record = format.read_record(storage, entry.key, f"{storage.uri}/{entry.key}")
        except FileNotFoundError:
            continue  # signed off meanwhile
        found.append(Position(record["consumer"], record["taken"], record["saved"]))
    return found


def wait(store: Store, *, high: int, low: int, stop: threading.Event | None = None, poll_s: float = POLL_S) -> Credit:
    """Blocks the producer while `high` or more committed units wait to be taken, until `low` or fewer do.

    The slowest consumer counts. Before anybody has registered nothing has been taken.
    """
    if not 0 <= low < high:
        raise UserError(f"low={low}, high={high}; a producer resumes at fewer waiting units than it stopped at")
    started, slowest = time.monotonic(), ""
    limit = high - 1
    while True:
        consumers = positions(store.storage)
        first = min(consumers, key=lambda p: p.taken, default=Position("", 0, 0))
        waiting = len(store.committed()) - first.taken
        if waiting <= limit:
            return Credit(time.monotonic() - started if slowest or limit == low else 0.0, slowest)
        if limit != low:
            logger.info("%d units wait for %s: producing again at %d", waiting, first.consumer or "a consumer", low)
        limit, slowest = low, first.consumer
        if (stop or threading.Event()).wait(poll_s):
            return Credit(time.monotonic() - started, slowest)


def _key(consumer: str) -> str:
    return f"consumers/{format.checked_name(consumer, 'consumer')}.json"
