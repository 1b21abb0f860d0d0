"""FORMAT.md says what the code does: stores of a real harvest and of an import are read by its words alone."""

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from sae_dist import config, storage
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import Harvester
from sae_dist.harvest.units import sequences_of
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import LanguageModel, load
from sae_dist.service.prepare import prepare
from sae_dist.shards import (
    commits,
    consumers,
    format,
    joined,
    lease,
    manifest,
    records,
    retention,
    stores,
    verify,
)
from sae_dist.shards.commits import Commit, ShardFile
from sae_dist.shards.format import ELEMENTS, StoreMeta
from sae_dist.shards.imports.config import ImportConfig
from sae_dist.shards.imports.run_import import import_store
from sae_dist.shards.statistics import Statistics
from sae_dist.text.jsonl import JsonlText
from sae_dist.text.tokenize import TokenSplit
from tests.harvest.one_unit import harvest
from tests.shards import predictable, specification
from tests.shards.specification import TEXT, table

HOOKS = ("resid_post.1", "mlp_act.0")
CONFIG = HarvestConfig(tokens=768, heldout_tokens=128, context=32, unit_sequences=4, slice_rows=50, seed=5)
RETIRED, AGAIN = 0, 3  # units


class Harvested(NamedTuple):
    """The folder of a store, and what its rows were made of."""

    folder: Path
    model: LanguageModel
    split: TokenSplit


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Harvested:
    """What the harvest command does to a store, without Ray; then one unit is retired, and one withdrawn and remade."""
    folder = tmp_path_factory.mktemp("harvested")
    words, generator = ["river", "stone", "cloud", "light", "under", "winter", "copper"], random.Random(0)
    lines = (json.dumps({"text": " ".join(generator.choices(words, k=30))}) for _ in range(80))
    (folder / "text.jsonl").write_text("\n".join(lines))
    settings = ModelConfig(name="tiny-llama", dtype="float32")
    prepared = prepare(
        model=settings, hook_points=HOOKS, text=JsonlText(path=str(folder / "text.jsonl")), harvest=CONFIG,
        folder=folder / "text", store_uri=str(folder / "store"), progress=lambda _: None,
    )  # fmt: skip
    model = load(settings)
    place = storage.open(folder / "store")
    fill(place, model, prepared.split)
    store = stores.open(place)
    store.snapshot()
    consumers.report(place, consumers.ConsumerPosition("a", RETIRED + 1, RETIRED + 1))
    retention.retire(store, retention.UntilConsumed())
    verify.withdraw(store, [AGAIN])
    fill(place, model, prepared.split)
    return Harvested(folder / "store", model, prepared.split)


def fill(place: storage.Storage, model: LanguageModel, split: TokenSplit) -> None:
    """Harvests the units that the store lacks."""
    store = stores.open(place)
    with lease.lease(place, "runs/a", key="store", folder="producers") as held:
        harvester = Harvester(model, store, HOOKS, split=split, config=CONFIG)
        for attempt, unit in enumerate(sorted(set(range(store.meta.n_units)) - set(store.committed())), start=1):
            harvester.harvest(unit, producer=held.producer(attempt))
        harvester.close()


@pytest.fixture
def imported(tmp_path) -> Path:
    np.save(tmp_path / "acts.npy", np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32))
    import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / "acts.npy"), unit_rows=100))
    return tmp_path / "store"


def test_every_field_is_in_the_specification_and_no_other():
    assert list(table("Field of meta")) == [field.name for field in dataclasses.fields(StoreMeta)]
    assert {*table("Field of a commit"), "digest"} == {*Commit._fields, "format_version", "statistics"}
    sealed = {
        "a manifest": manifest.Manifest,
        "a store": stores.StoreRecord,
        "the places of parts": joined.PartsRecord,
    }
    for name, fields in sealed.items():
        assert {*table(f"Field of {name}"), "digest"} == set(fields._fields)
    plain = {"a shard": ShardFile, "the statistics": Statistics, "a position": consumers.ConsumerPosition}
    for name, fields in (plain | {"a holder": lease.LeaseHolder, "a beat": lease.Heartbeat}).items():
        assert list(table(f"Field of {name}")) == list(fields._fields)
    assert f"format version {format.FORMAT_VERSION}" in TEXT.splitlines()[0]


def test_the_limits_are_those_of_the_specification():
    def value(name: str) -> int:
        power, more = re.match(r"2\^(\d+)( - 1)?", table("Limit")[name][0]).groups()
        return 2 ** int(power) - bool(more)

    assert value("units of a store") == format.MAX_UNITS
    assert value("hook points of a store") == format.MAX_HOOKS
    assert value("width of a hook point") == format.MAX_WIDTH
    assert value("bytes of a commit") == commits.COMMIT_BYTES
    assert value("bytes of any other record") == records.SMALL_BYTES
    meta = predictable.meta(unit_rows=value("rows of a unit"))
    assert format.manifest_bytes(meta) == value("bytes of a manifest") + 128 * meta.n_units
    with pytest.raises(ValueError, match="a unit holds fewer than"):
        predictable.meta(unit_rows=value("rows of a unit") + 1)


def test_every_object_of_a_harvested_store_is_specified(harvested):
    assert specification.objects(harvested.folder) == set(table("Key")) - {"probe/<random>", "parts.json"}
    meta = specification.record(harvested.folder, "store.json")["meta"]
    assert list(meta["extra"]) == list(table("Entry of extra in a harvest"))
    assert meta["extra"]["token_streams"] == harvested.split.digest
    assert not list((harvested.folder / "data").glob(f"*/{RETIRED:08d}/*"))


def test_its_rows_are_read_from_the_specification_alone(harvested):
    n_units = specification.record(harvested.folder, "store.json")["meta"]["n_units"]
    assert n_units == 7
    for unit in set(range(n_units)) - {RETIRED}:
        work = sequences_of(unit, CONFIG)
        stream = harvested.split.heldout if work.heldout else harvested.split.train
        source = harvest(harvested.model, HOOKS, sequences=stream.sequences(work.sequences), config=CONFIG)
        p = specification.scatter(len(source.doc), CONFIG.seed, unit)
        for hook in HOOKS:
            rows = specification.rows(harvested.folder, hook, unit)
            assert np.array_equal(rows.x, source.states[hook].bfloat16().float().numpy()[p])
            for name in ("doc", "pos", "token"):
                assert getattr(rows, name).tolist() == getattr(source, name)[p].tolist()


def test_a_unit_that_was_withdrawn_returns_with_the_same_rows_and_another_attempt(harvested):
    (old,) = (path.name for path in (harvested.folder / "withdrawn").iterdir())
    before = specification.record(harvested.folder, f"withdrawn/{old}")
    after = specification.record(harvested.folder, f"commit/{AGAIN:08d}.json")
    assert before["attempt"].startswith("000001-") and after["attempt"].startswith("000002-1-")
    assert {hook: shard["xxh3_128"] for hook, shard in before["shards"].items()} == {
        hook: shard["xxh3_128"] for hook, shard in after["shards"].items()
    }
    pinned = specification.record(harvested.folder, "manifest/v000001.json")["commits"]
    assert pinned[str(AGAIN)] == [before["rows"], specification.digest(before)]
    store = stores.open(storage.open(harvested.folder))
    assert store.pinned(1).commits[AGAIN].digest != specification.digest(after)


def test_an_imported_store_is_read_from_the_specification_alone(imported):
    kinds = specification.objects(imported)
    assert kinds == {"store.json", "data/<hook>/<unit>/<attempt>.arrow", "commit/<unit>.json"}
    meta = specification.record(imported, "store.json")["meta"]
    assert list(meta["extra"]) == list(table("Entry of extra in an import"))
    source = np.load(imported.parent / "acts.npy")
    units = [specification.rows(imported, "imported", unit) for unit in range(meta["n_units"])]
    for rows in units:
        assert np.array_equal(rows.x, source[rows.doc.astype(int)])
        assert not rows.pos.any() and not rows.token.any()
    assert sorted(np.concatenate([rows.doc for rows in units])) == list(range(600))


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_shards_have_the_columns_and_types_that_are_specified(tmp_path, dtype):
    store = predictable.filled(storage.open(tmp_path), dtype=dtype)
    shard = store.commit(1).shards["resid_post.2"]
    with pa.memory_map(str(tmp_path / shard.key)) as source:
        file = pa.ipc.open_file(source)
        schema, batches = file.schema, [file.get_batch(i) for i in range(file.num_record_batches)]
    assert {field.name: str(field.type) for field in schema} == specification.columns(dtype, predictable.WIDTH)
    assert {key.decode() for key in schema.metadata} == set(re.findall(r"`(sae\.\w+)`", TEXT))
    assert [batch.num_rows for batch in batches] == [ref.rows for ref in shard.slices] == [20, 20, 20, 20, 9]


def test_a_store_of_another_version_is_refused(tmp_path):
    predictable.filled(storage.open(tmp_path))
    record = json.loads((tmp_path / "store.json").read_bytes())
    del record["digest"]
    record["meta"]["format_version"] = 2
    (tmp_path / "store.json").write_bytes(records.seal(record))
    with pytest.raises(config.UserError, match="format_version=2; this sae_dist reads version 1"):
        stores.open(storage.open(tmp_path))
