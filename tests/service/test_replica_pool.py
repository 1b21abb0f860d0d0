"""The harvest service, for real: Ray, replicas of two processes, kill -9 and SIGSTOP; every row is looked at."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import UnitReport
from sae_dist.model import tiny
from sae_dist.service.placement import Bundle
from sae_dist.shards import writer
from sae_dist.shards.reader import unit_rows
from sae_dist.storage import Unavailable
from sae_dist.text import document, files
from tests.service import stores
from tests.shards import predictable


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return stores.predictable_model(tmp_path_factory.mktemp("model"))


def phases(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("phase") == "harvest"]


def replicas() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "Replica" in child.name()]


@pytest.mark.slow
def test_a_replica_of_two_processes_gives_the_rows_of_one(model, tmp_path):
    out, store = tmp_path / "out", str(tmp_path / "store")
    assert main(stores.overrides(model, store, out, "harvest.tensor_parallel=2", tokens=2048)) == 0
    stores.check_every_row(stores.opened(store), model, out, tokens=2048)
    assert not replicas()


@pytest.mark.slow
def test_the_units_of_a_killed_replica_are_done_by_others(model, tmp_path, monkeypatch):
    rule = {"point": "writer.before_commit", "action": "kill", "where": {"unit": 3}, "once": str(tmp_path / "killed")}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([rule]))
    out, store = tmp_path / "out", str(tmp_path / "store")
    assert main(stores.overrides(model, store, out, "harvest.replicas=2")) == 0
    stores.check_every_row(stores.opened(store), model, out)
    last = phases(out)[-1]
    assert (last["units"], last["of"], last["leased"], last["deaths"]) == (22, 22, 0, 1)
    assert 1 <= last["retried"] <= 2 and last["expired"] == 0


@pytest.mark.slow
def test_one_replica_of_one_process_gives_the_same_and_says_what_it_does_with_its_time(model, tmp_path):
    out, store = tmp_path / "out", str(tmp_path / "store")
    assert main(stores.overrides(model, store, out)) == 0
    stores.check_every_row(stores.opened(store), model, out)
    figures = phases(out)[-1]
    assert figures["tokens"] == 22 * 256
    assert (figures["deaths"], figures["retried"], figures["duplicates"]) == (0, 0, 0)
    assert figures["tokens_per_second"] > 0 and 0 < figures["replica0/utilisation"] < 1
    assert all(figures[f"replica0/{part}"] >= 0 for part in ("tokenise", "forward", "copy", "write", "blocked"))


@pytest.mark.slow
def test_two_replicas_of_two_processes_of_which_some_die_and_one_hangs_fill_the_store(model, tmp_path, monkeypatch):
    """Killed before the data, between data and commit, after the commit, in either process; stopped in either."""
    faults = [
        {"point": point, "action": action, "where": {"unit": unit}, "once": str(tmp_path / f"{point}-{unit}")}
        for point, action, unit in (
            ("writer.before_data", "kill", 2),
            ("writer.before_commit", "kill", 5),
            ("writer.after_commit", "kill", 8),
            ("harvester.after_forward", "kill", 10),  # by one of the two processes, whichever it is
            ("harvester.before_forward", "stop", 13),
        )
    ]
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps(faults))
    out, store = tmp_path / "out", str(tmp_path / "store")
    two = ["harvest.tensor_parallel=2", "harvest.replicas=2", "harvest.lease_s=30"]
    assert main(stores.overrides(model, store, out, *two)) == 0
    assert all((tmp_path / f"{rule['point']}-{rule['where']['unit']}").exists() for rule in faults)
    stores.check_every_row(stores.opened(store), model, out)
    last = phases(out)[-1]
    assert (last["units"], last["of"], last["leased"]) == (22, 22, 0)
    assert last["deaths"] == 5 and last["expired"] == 1  # each of the faults, and nothing else
    assert 5 <= last["retried"] <= 10
    assert last["duplicates"] >= 1  # the unit whose replica died after it had committed it
    assert not replicas()


@pytest.mark.slow
def test_a_unit_that_kills_every_replica_ends_the_harvest_with_its_number(model, tmp_path, monkeypatch):
    rule = {"point": "harvester.before_forward", "action": "kill", "where": {"unit": 1}, "nth": 0}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([rule]))
    with pytest.raises(RuntimeError, match=r"(unit [12] was lost 5 times|5 replicas died in a row)"):
        main(stores.overrides(model, str(tmp_path / "store"), tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_rows_that_are_nan_infinite_or_huge_are_counted_and_left_out(tmp_path):
    nan, infinite, huge = tiny.tokenizer()("vkb")["input_ids"]
    model = stores.predictable_model(tmp_path / "model", {nan: math.nan, infinite: math.inf, huge: 1e5})
    out, store = tmp_path / "out", str(tmp_path / "store")
    more = ("harvest.max_nonfinite_fraction=0.5", "harvest.max_outlier_fraction=0.5")
    assert main(stores.overrides(model, store, out, *more, hooks=["resid_pre.0"])) == 0
    streams = [stream.tokens.reshape(-1, 32)[:, 1:] for stream in stores.split_of(out)]  # the first is dropped anyway
    times = {token: sum(int((tokens == token).sum()) for tokens in streams) for token in (nan, infinite, huge)}
    figures = phases(out)[-1]
    assert min(times.values()) > 0
    assert figures["nonfinite"] == times[nan] + times[infinite]
    assert figures["outliers"] == times[huge]
    opened = stores.opened(store)
    parts = [part for unit in range(22) for part in unit_rows(opened, "resid_pre.0", unit, 64)]
    assert all(torch.equal(part.x, stores.embedding(torch.as_tensor(part.token), 32)) for part in parts)
    assert not {nan, infinite, huge} & {int(token) for part in parts for token in part.token}


@pytest.mark.slow
def test_empty_enormous_and_undecodable_documents_are_counted_and_the_rest_is_harvested(model, tmp_path, monkeypatch):
    for module in (files, document):
        monkeypatch.setattr(module, "MAX_CHARS", 400)  # what is enormous
    (tmp_path / "texts").mkdir()
    for i in range(16):
        numbers = " ".join(str(n * n) for n in range(50 * i, 50 * i + 50))  # no two texts alike: those count once
        texts = {"empty": "", "blank": " \n", "long": f"{i} {numbers} {numbers[::-1]}", "torn": f"{numbers}\udcff"}
        for name, text in texts.items():
            (tmp_path / "texts" / f"{name}{i}.txt").write_bytes(text.encode(errors="surrogateescape"))
    out, store = tmp_path / "out", str(tmp_path / "store")
    more = ("text=files", f"text.path={tmp_path / 'texts'}")
    assert main(stores.overrides(model, store, out, *more)) == 0
    stores.check_every_row(stores.opened(store), model, out)
    said = json.loads((out / "status.json").read_text())["text"]
    assert all(said[f"{what} documents"] >= 1 for what in ("empty", "cut", "undecodable"))


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused(model, tmp_path, capsys):
    assert main(stores.overrides(model, str(tmp_path / "store"), tmp_path / "out", "harvest.gpus=1")) == 2
    assert "1 x {CPU: 1, GPU: 1}, one for each of its processes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_cannot_be_split_is_refused(tmp_path, capsys):
    arguments = stores.overrides(Path("tiny-gpt2"), str(tmp_path / "store"), tmp_path / "out")
    assert main([*arguments, "harvest.tensor_parallel=2"]) == 2
    assert "no tensor-parallel plan for GPT2LMHeadModel" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fault_of_the_program_is_no_dead_replica():
    """An error that another replica would make too is raised at once; one of the machine is a loss."""
    from sae_dist.service.cluster import cluster, result_of  # sets what ray reads when it is imported

    import ray  # isort: skip
    from ray.exceptions import RayTaskError

    from sae_dist.service.replica_handle import ReplicaLost, StorageLost, replica_result

    @ray.remote
    def fails(error: Exception) -> None:
        raise error

    with cluster("local", cpus=1):
        with pytest.raises(RayTaskError, match="IndexError"):
            replica_result(fails.remote(IndexError("index out of range in self")))
        with pytest.raises(ReplicaLost, match="OSError: the disk"):
            replica_result(fails.remote(OSError("the disk")))
        with pytest.raises(UserError, match="the cure"):
            replica_result(fails.remote(UserError("the cure")))
        with pytest.raises(StorageLost, match="no answer"):
            replica_result(fails.remote(Unavailable("no answer")))
        with pytest.raises(Unavailable, match="no answer"):
            result_of(fails.remote(Unavailable("no answer")))


class StandIn:
    """A replica that is ready at once and works on its units until it is lost."""

    lost: dict[int, Exception] = {}
    calls: dict[int, Callable[[], list[Any]]] = {}  # by unit; no call at all for others

    def __init__(self, number: int, *_: object, now: float, **__: object) -> None:
        self.number, self.state, self.ready, self.draining = number, "ready", True, False
        self.ready_at, self.flop_per_s = now, 0.0
        self.loaded: list[Any] = []
        self.steps: list[Any] = []

    def advance(self, now: float) -> bool:
        del now
        if self.number in self.lost:
            raise self.lost[self.number]
        return True

    def harvest(self, unit: int, producer: str) -> list[Any]:
        del producer
        return self.calls.get(unit, list)()

    def delays(self, now: float) -> dict[tuple[int, int], float]:
        del now
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def new_pool(tmp_path, monkeypatch):
    """Makes the pool of a harvest whose replicas are no processes."""
    from sae_dist.service import replica_pool

    monkeypatch.setattr(replica_pool, "ReplicaHandle", StandIn)
    monkeypatch.setattr(StandIn, "lost", {})
    monkeypatch.setattr(StandIn, "calls", {})
    pools = []

    def make(n_units: int, **harvest: Any) -> Any:
        store = writer.create(storage.open(tmp_path / "store"), predictable.meta(n_units=n_units))
        config, bundle = HarvestConfig(**harvest), Bundle(1, 0)
        pools.append(replica_pool.ReplicaPool(None, config, bundle=bundle, store=store, out=str(tmp_path)))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_a_lost_node_counts_once_however_many_replicas_it_had(new_pool):
    """Those that are started in their place, and die too, one after the other, end the harvest."""
    from sae_dist.service.replica_handle import ReplicaLost

    pool = new_pool(40, replicas=16)
    pool.poll(0.0)
    assert pool.facts()["replicas"] == 16
    StandIn.lost = {number: ReplicaLost("the node is gone") for number in range(8, 16)}
    pool.poll(0.0)
    pool.poll(0.0)
    assert (pool.facts()["deaths"], pool.facts()["replicas"], pool.facts()["retried"]) == (8, 16, 16)
    for number in range(23, 26):  # the newest replica each time: four in a row with the node
        StandIn.lost[number] = ReplicaLost("killed")
        pool.poll(0.0)
        pool.poll(0.0)
    StandIn.lost[26] = ReplicaLost("killed")
    with pytest.raises(RuntimeError, match="5 replicas died in a row, .*: killed"):
        pool.poll(0.0)
    assert pool.facts()["deaths"] == 12


def test_a_harvest_none_of_whose_replicas_reaches_storage_stops_and_is_not_refused(new_pool):
    from sae_dist.service.replica_handle import StorageLost

    pool = new_pool(6, replicas=1)
    for number in range(4):
        StandIn.lost[number] = StorageLost("store=s3://bucket/x: PUT y failed for 120 s")
        pool.poll(0.0)
        pool.poll(0.0)
    assert pool.facts()["deaths"] == 4 and not pool.done
    StandIn.lost[4] = StorageLost("store=s3://bucket/x: PUT y failed for 120 s")
    with pytest.raises(Unavailable, match="5 replicas died in a row, .*: store=s3://bucket/x: PUT y failed"):
        pool.poll(0.0)


@pytest.mark.slow
def test_a_drained_replica_whose_second_process_is_still_in_its_unit_does_no_harm(new_pool, tmp_path):
    """Its first process has reported the unit: there is nothing left for it, and it is closed."""
    from sae_dist.service.cluster import cluster  # sets what ray reads when it is imported

    import ray  # isort: skip

    @ray.remote(num_cpus=0)
    def opened(gate: Path, result: object) -> object:
        while not gate.exists():
            time.sleep(0.01)
        return result

    def report(unit: int) -> UnitReport:
        return UnitReport(unit, 1, 1, 0, 0, False, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)

    first, others, deadline = tmp_path / "first", tmp_path / "others", time.monotonic() + 300
    with cluster("local", cpus=1):
        late = opened.remote(others, None)
        StandIn.calls = {
            0: lambda: [opened.remote(first, report(0)), opened.remote(others, None)],
            1: lambda: [ray.put(report(1)), late],
        }
        pool = new_pool(2, replicas=2, tensor_parallel=2)
        while pool.facts()["units"] == 0 or pool.facts()["replicas"] == 2:
            pool.poll(0.1)
            assert time.monotonic() < deadline
        others.touch()
        ray.get(late)
        pool.poll(0.0)
        pool.poll(0.0)
        first.touch()
        while not pool.done:
            pool.poll(0.1)
            assert time.monotonic() < deadline
        assert pool.facts()["deaths"] == 0
