"""A replica at work, in one process: order, overlap, bounds, and what ends up in the store."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.harvest import harvester as module
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import Harvester, Progress
from sae_dist.harvest.units import sequences_of, unit_counts
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.reader import Store, unit_rows
from sae_dist.shards.writer import create
from sae_dist.storage import Storage
from sae_dist.storage.s3 import S3Config, S3Storage
from sae_dist.text.corpus import BuiltinText
from sae_dist.text.tokenize import TokenSplit, tokenize
from tests.harvest.one_unit import harvest
from tests.shards.conftest import double  # noqa: F401  a fixture

MODEL = load(ModelConfig(name="tiny-llama", dtype="float32"))
HOOKS = ("resid_post.1", "mlp_act.2")
CONFIG = HarvestConfig(tokens=2000, heldout_tokens=400, context=20, unit_sequences=10, dtype="float32")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    return tokenize(
        BuiltinText(), MODEL.tokenizer, context=20, n_tokens=2400, heldout_fraction=400 / 2400, seed=0,
        folder=tmp_path_factory.mktemp("text"),
    )  # fmt: skip


def new_store(place: Path | Storage) -> Store:
    n_train, n_heldout = unit_counts(CONFIG)
    meta = StoreMeta(
        model="tiny-llama", model_fingerprint=MODEL.fingerprint, tokenizer="-", text_fingerprint="-", context=20,
        hooks={hook: MODEL.width(hook) for hook in HOOKS}, n_units=n_train + n_heldout, heldout_units=n_heldout,
        unit_rows=190, slice_rows=64, dtype="float32",
    )  # fmt: skip
    return create(storage.open(place) if isinstance(place, Path) else place, meta)


def stored(store: Store, hook: str, unit: int) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (int(doc), int(pos)): x.clone()
        for part in unit_rows(store, hook, unit, 64)
        for doc, pos, x in zip(part.doc, part.pos, part.x, strict=True)
    }


@pytest.mark.slow
def test_the_store_holds_what_harvest_gives_whatever_the_order_of_the_calls(tmp_path: Path, split: TokenSplit):
    store = new_store(tmp_path)
    harvester = Harvester(MODEL, store, HOOKS, split=split, config=CONFIG)
    order = [7, 2, 11, 0]
    with ThreadPoolExecutor(4) as callers:
        reports = list(callers.map(harvester.harvest, reversed(order), reversed(range(4))))
    harvester.close()
    assert [report.unit for report in reports if report is not None] == list(reversed(order))
    assert store.committed().keys() == set(order)
    for unit in order:
        work = sequences_of(unit, CONFIG)
        stream = split.heldout if work.heldout else split.train
        expected = harvest(MODEL, HOOKS, sequences=stream.sequences(work.sequences), config=CONFIG)
        for hook in HOOKS:
            rows = stored(store, hook, unit)
            assert len(rows) == len(expected.doc)
            for i, key in enumerate(zip(expected.doc.tolist(), expected.pos.tolist(), strict=True)):
                assert torch.equal(rows[key], expected.states[hook][i])


def test_a_unit_is_in_the_model_while_the_one_before_it_is_written_and_no_more_than_two_are_in_memory(
    tmp_path: Path, split: TokenSplit, monkeypatch: pytest.MonkeyPatch
):
    """Writing waits until the next unit has left the model: without overlap this would wait for ever."""
    events: list[tuple[str, int]] = []
    forwarded = [threading.Event() for _ in range(5)]
    forwarded[4].set()  # there is none after the last
    forward, write, unit_in_model = module.forward, module.write_unit_once, iter(range(5))

    def recorded_forward(*args, **kwargs):
        unit = next(unit_in_model)
        events.append(("begin", unit))
        states = forward(*args, **kwargs)
        forwarded[unit].set()
        return states

    def slow_write(store, unit, *args, **kwargs):
        assert forwarded[min(unit + 1, 4)].wait(30), "the next unit did not enter the model meanwhile"
        written = write(store, unit, *args, **kwargs)
        events.append(("written", unit))
        return written

    monkeypatch.setattr(module, "forward", recorded_forward)
    monkeypatch.setattr(module, "write_unit_once", slow_write)
    harvester = Harvester(MODEL, new_store(tmp_path), HOOKS, split=split, config=CONFIG)
    with ThreadPoolExecutor(5) as callers:
        reports = list(callers.map(harvester.harvest, range(4), range(4)))
    harvester.close()
    for unit in range(2, 4):  # unit u begins only when unit u - 2 has been written
        assert events.index(("written", unit - 2)) < events.index(("begin", unit))
    assert harvester.progress.units == 4
    assert harvester.progress.positions == 4 * 200
    assert all(report is not None and report.flop > 0 for report in reports)


def test_a_unit_that_cannot_be_written_does_not_stop_the_next_one(tmp_path: Path, split: TokenSplit):
    store = new_store(tmp_path)
    harvester = Harvester(MODEL, store, HOOKS, split=split, config=CONFIG)
    (tmp_path / "data").write_text("a file in the way of a folder")
    with pytest.raises((OSError, UserError)):
        harvester.harvest(0)
    (tmp_path / "data").unlink()
    report = harvester.harvest(1)
    harvester.close()
    assert report is not None
    assert store.committed().keys() == {1}


def test_a_replica_whose_storage_refuses_for_the_moment_gives_signs_of_life(double, split: TokenSplit):  # noqa: F811
    store = new_store(S3Storage("bucket", "s", S3Config(pause_s=0.01, longest_pause_s=0.05)))
    harvester = Harvester(MODEL, store, HOOKS, split=split, config=CONFIG)
    rule = double.fail("503", method="PUT", key="s/data/")
    seen, deadline = set[Progress](), time.monotonic() + 60
    with ThreadPoolExecutor(1) as caller:
        report = caller.submit(harvester.harvest, 0)
        while len(seen) < 5:
            if rule.done:  # it is through with the model, and writes
                seen.add(harvester.progress)
            time.sleep(0.01)
            assert time.monotonic() < deadline
        double.rules.clear()
        assert report.result(60) is not None
    harvester.close()
    assert {progress.positions for progress in seen} == {200}
    assert store.committed().keys() == {0}
