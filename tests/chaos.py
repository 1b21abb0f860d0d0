"""Everything goes wrong at once, by a seed: producers and consumers are killed, stopped and resized, the network
fails, caches rot. After each episode no row is lost, doubled or wrong, and the order is that of a calm run.

    python -m tests.chaos --minutes 10 --seed 1
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from sae_dist import storage
from sae_dist.shards import gc, reader, stores, verify, writer
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.storage import Storage
from tests.memory_storage import MemoryStorage
from tests.shards import children, predictable
from tests.shards.s3_double import S3Double
from tests.shards.seaweedfs import KEYS

UNITS, STEPS, PRODUCERS = 9, 40, 2
KILLS = 4  # times that the consumers of an episode are killed, so that it ends
POINTS = (
    "writer.before_data",
    "writer.before_hook",
    "writer.after_hook",
    "writer.before_commit",
    "writer.after_commit",
)
NETWORK = ("500", "503", "429", "reset", "cut", "lost", "lost500", "flip")
GROWTH_BYTES = 300 << 20  # of this process over a whole run: it holds the objects of one episode, a few MB


class Broken(AssertionError):
    """A promise that did not hold; names the seed and the episode."""


def run(seconds: float, seed: int) -> Counter[str]:
    """Episodes until the time is up; counts what was done to the store."""
    done: Counter[str] = Counter()
    started, episode = time.monotonic(), 0
    memory = psutil.Process().memory_info().rss
    while time.monotonic() - started < seconds:
        rng = random.Random(f"{seed}/{episode}")
        with tempfile.TemporaryDirectory() as folder, S3Double() as server:
            os.environ.update({**KEYS, "AWS_ENDPOINT_URL": server.endpoint})
            remote = rng.random() < 0.7
            place = storage.open("s3://bucket/store" if remote else Path(folder) / "store")
            try:
                _episode(place, server, rng, Path(folder), done)
            except AssertionError as error:
                raise Broken(f"seed {seed}, episode {episode}: {error}") from error
            finally:
                del os.environ["AWS_ENDPOINT_URL"]
            done["faults served"] += sum(rule.done for rule in server.rules)
        episode += 1
        done["episodes"] += 1
    grown = psutil.Process().memory_info().rss - memory
    assert grown < GROWTH_BYTES, f"this process grew by {grown >> 20} MiB"
    return done


def _episode(place: Storage, server: S3Double, rng: random.Random, folder: Path, done: Counter[str]) -> None:
    meta = predictable.meta(n_units=UNITS, seed=rng.randrange(1 << 30))
    writer.create(place, meta)
    calm = _calm(meta)
    for action in rng.sample(NETWORK, 4):
        if action == "flip":  # only what is read has a checksum
            server.fail(action, share=0.01, method="GET")
        else:
            server.fail(action, share=rng.uniform(0.01, 0.05))
    producers = [_producer(place, rng) for _ in range(PRODUCERS)]
    step, total, kills, told = 0, 0, 0, {}
    while step < STEPS:
        world = rng.randint(1, 4)
        reports = [str(folder / f"{step}-{rank}-{rng.random()}") for rank in range(world)]
        ranks = [
            children.start(
                children.consume,
                place.uri,
                reports[r],
                STEPS - step,
                step,
                total if r == 0 else 0,
                r,
                world,
                str(folder / "cache"),
            )
            for r in range(world)
        ]
        until = time.monotonic() + rng.uniform(0.3, 3.0)
        fatal = kills < KILLS and rng.random() < 0.7
        kills += fatal
        while any(rank.is_alive() for rank in ranks) and not (fatal and time.monotonic() > until):
            _keep_producing(place, producers, rng, done)
            time.sleep(0.05)
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                done["consumers killed"] += 1
            rank.join()
            assert rank.exitcode in (0, -signal.SIGKILL), f"a consumer ended with {rank.exitcode}"
        shares = [children.told(report) for report in reports]
        common = min((max(share, default=step - 1) for share in shares), default=step - 1)
        for s in range(step, common + 1):
            told[s] = sum(share[s] for share in shares) % 2**64
        step, total = common + 1, told.get(common, total)
        _spoil_a_cached_file(folder / "cache", rng, done)
    assert [told[s] for s in range(STEPS)] == calm, "the order is not that of a calm run"
    deadline = time.monotonic() + 120
    while len(stores.open(place).committed()) < UNITS or any(p.is_alive() for p in producers):
        _keep_producing(place, producers, rng, done, revive=len(stores.open(place).committed()) < UNITS)
        assert time.monotonic() < deadline, "producers do not finish"
        time.sleep(0.05)
    server.rules, rules = [], server.rules
    _nothing_is_amiss(place)
    server.rules = rules
    done["units"] += UNITS
    done["steps"] += STEPS


def _calm(meta) -> list[int]:
    """order_hash of every step, read from a store that nothing happened to."""
    store = writer.create(MemoryStorage(f"calm-{meta.seed}"), meta)
    for unit in range(UNITS):
        predictable.write(store, unit)
    with Loader(store, hooks=Hooks(("resid_post.2",)), batch=32, seed=9, order=children.ORDER) as loader:
        hashes = [next(loader).order_hash for _ in range(STEPS)]
    for entry in store.storage.list():
        store.storage.delete(entry.key)
    return hashes


def _producer(place: Storage, rng: random.Random) -> BaseProcess:
    """A producer that works through all units in its own order and mostly comes to harm on the way."""
    units = rng.sample(range(UNITS), UNITS)
    faults = []
    if rng.random() < 0.8:
        action = rng.choice(("kill", "kill", "stop"))
        faults = [{"point": rng.choice(POINTS), "action": action, "where": {"unit": rng.randrange(UNITS)}}]
    return children.start(children.produce, place.uri, units, faults=faults)


def _keep_producing(
    place: Storage, producers: list[BaseProcess], rng: random.Random, done: Counter[str], *, revive: bool = True
) -> None:
    for index, producer in enumerate(producers):
        if producer.is_alive():
            if _is_stopped(producer) and rng.random() < 0.1:
                os.kill(producer.pid, signal.SIGCONT)  # others may have committed its unit in the meantime
                done["producers stopped"] += 1
            continue
        assert producer.exitcode in (0, -signal.SIGKILL), f"a producer ended with {producer.exitcode}"
        if producer.exitcode and revive:
            done["producers killed"] += 1
            producers[index] = _producer(place, rng)


def _is_stopped(process: BaseProcess) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:  # it ended just now
        return False


def _spoil_a_cached_file(cache: Path, rng: random.Random, done: Counter[str]) -> None:
    files = sorted(cache.glob("??/*.slice"))
    if files and rng.random() < 0.7:
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        done["cached files spoiled"] += 1


def _nothing_is_amiss(place: Storage) -> None:
    store = stores.open(place)
    commits = store.committed()
    assert sorted(commits) == list(range(UNITS)), f"units {sorted(commits)}"
    found = verify.verify(store)
    assert found.bad == [], found.bad
    for hook in store.meta.hooks:
        for unit in commits:
            parts = list(reader.unit_rows(store, hook, unit, 1000))
            assert all(predictable.is_true(hook, p.x, p.doc, p.pos) for p in parts), f"unit {unit} has a wrong row"
            ids = sorted((int(d), int(q)) for p in parts for d, q in zip(p.doc, p.pos, strict=True))
            rows = predictable.rows_of(unit, store.meta.unit_rows)
            expected = sorted(zip(rows["doc"].tolist(), rows["pos"].tolist(), strict=True))
            assert ids == expected, f"unit {unit} lost or doubled a row"
    gc.collect(store, age_s=0, delete=True, now=time.time() + 60)
    named = {shard.key for commit in commits.values() for shard in commit.shards.values()}
    assert {entry.key for entry in place.list("data/")} == named, "gc left or took too much"
    assert list(place.leftovers()) == [], "unfinished writes are left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    done = run(60 * arguments.minutes, arguments.seed)
    left = [child.pid for child in psutil.Process().children(recursive=True) if "python" in child.name()]
    print(json.dumps({"seed": arguments.seed, **done, "processes of the fork server": len(left)}))


if __name__ == "__main__":
    main()
