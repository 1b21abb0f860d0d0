"""Real processes that work on a store and can be killed: forked from a server that has imported everything once."""

import json
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from sae_dist import storage
from sae_dist.shards import copy, gc, stores, writer
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.slice_cache import SliceCache
from sae_dist.storage.aws import models
from sae_dist.storage.s3 import S3Config, S3Storage
from tests.processes import PROCESSES
from tests.shards import predictable

for part in ("service-2", "endpoint-rule-set-1"):
    models().load_service_model("s3", part)  # parsed once by the fork server, not by each child
ORDER = OrderConfig(lanes=4, window=2, round_units=2)
SETTINGS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")


def start(work: Callable[..., None], *arguments: object, faults: list[dict[str, object]] | None = None) -> BaseProcess:
    """`work(*arguments)` in a process of its own, with the faults switched on in it alone."""
    environment = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if faults:
        environment["SAE_DIST_FAULTS"] = json.dumps(faults)
    process = PROCESSES.Process(target=_child, args=(environment, work, arguments), daemon=True)
    process.start()
    return process


def _child(environment: dict[str, str], work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    work(*arguments)


def produce(uri: str, units: list[int], report: str = "", part_bytes: int = 0) -> None:
    """Writes the units; says in `report` how many commits were its own."""
    place = storage.open(uri)
    if part_bytes and isinstance(place, S3Storage):
        place = S3Storage(place.bucket, place.prefix, S3Config(part_bytes=part_bytes))
    store = stores.open(place)
    won = [predictable.write(store, unit).won for unit in units]
    if report:
        Path(report).write_text(str(sum(won)))


def make_and_produce(uri: str, units: list[int]) -> None:
    store = writer.create(storage.open(uri), predictable.meta())
    for unit in units:
        predictable.write(store, unit)


def copy_store(source: str, target: str) -> None:
    copy.copy(stores.open(storage.open(source)), storage.open(target), threads=1)


def collect_garbage(uri: str, now: float) -> None:
    gc.collect(stores.open(storage.open(uri)), age_s=0, delete=True, now=now)


def consume(
    uri: str, report: str, steps: int, start_step: int, order_hash: int, rank: int, world: int, cache: str = ""
) -> None:
    """Reads `steps` batches, checks every row, and appends a line of (step, share of the order hash) for each."""
    hook = "resid_post.2"
    store = stores.open(storage.open(uri), cache=SliceCache(Path(cache), limit_bytes=1 << 30) if cache else None)
    with Loader(
        store,
        hooks=Hooks((hook,)),
        batch=32,
        seed=9,
        order=ORDER,
        start_step=start_step,
        order_hash=order_hash,
        rank=rank,
        world=world,
        live=True,
        stall_s=120,
    ) as loader:
        for batch in loader:
            assert predictable.is_true(hook, batch.x, batch.doc, batch.pos)
            with Path(report).open("a") as file:
                file.write(f"{batch.step} {batch.order_hash}\n")
            if batch.step + 1 == start_step + steps:
                return


def told(report: str | Path) -> dict[int, int]:
    """What `consume` reported, whole lines only: step -> share of the order hash."""
    text = Path(report).read_text() if Path(report).exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {int(step): int(value) for step, value in (line.split() for line in lines)}
