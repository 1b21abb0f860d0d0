"""Several stores as one, as a crosscoder over two models reads them: joined, trained on, moved, and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.shards import records, stores
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.reader import unit_rows
from sae_dist.shards.writer import create, write_unit

WIDTHS = {"base": 16, "chat": 12}
ROWS, UNITS = 300, 4


def activations(model: str, unit: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * unit + len(model) + WIDTHS[model])
    return torch.randn(ROWS, WIDTHS[model], generator=generator) + 3


def write(place: Path, models: dict[str, str], *, left_out: int = 0, shift: int = 0, units: int = UNITS, **meta) -> str:
    """A store of `models`, by hook point, on the same tokens; `left_out` rows of the second unit are missing."""
    settings = {"n_units": UNITS, "heldout_units": 1, "unit_rows": ROWS, "slice_rows": 128, "dtype": "float32"}
    hooks = {hook: WIDTHS[model] for hook, model in models.items()}
    made = create(storage.open(place), StoreMeta(model="+".join(models.values()), hooks=hooks, **(settings | meta)))
    for unit in range(units):
        kept = slice(left_out if unit == 1 else 0, None)
        ids = torch.arange(ROWS)[kept]
        x = {hook: activations(model, unit)[kept] for hook, model in models.items()}
        write_unit(made, unit, x, doc=1000 * unit + ids, pos=ids % 7, token=(ids + shift) % 11)
    return str(place)


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {model: write(tmp_path / model, {"resid_post.3": model}) for model in WIDTHS}


def join(parts: dict[str, str], place: str = "both") -> int:
    named = ", ".join(f"{name}: {uri}" for name, uri in parts.items())
    return main(["store", "join", f"store={place}", f"parts={{{named}}}"])


def train(store: str, hook: str, out: str) -> dict[str, object]:
    keys = ["sae.n_latents=64", "sae.k=4", "train.batch=64", "train.steps=30", "train.init_rows=256",
            "train.threads=1", "wandb.mode=disabled"]  # fmt: skip
    assert main(["train", f"store={store}", f"hook={hook}", *keys, f"out={out}"]) == 0
    return json.loads((Path(out) / "summary.json").read_text())


def test_a_crosscoder_over_two_stores_is_that_over_one_store_of_both(two, capsys):
    assert join(two) == 0
    said = capsys.readouterr().out
    assert "hook points base.resid_post.3 [16], chat.resid_post.3 [12]" in said and "1,200 rows" in said
    write(Path("one"), {"base.resid_post.3": "base", "chat.resid_post.3": "chat"})
    hooks = "[base.resid_post.3,chat.resid_post.3]"
    joined, alone = train("both", hooks, "joined"), train("one", hooks, "alone")
    assert joined["order_hash"] == alone["order_hash"] and joined["eval"] == alone["eval"]
    weights = [Path(out, "dictionary", "dictionary.safetensors").read_bytes() for out in ("joined", "alone")]
    assert weights[0] == weights[1]
    assert joined["sites"] == [{"hook": f"{model}.resid_post.3", "width": width} for model, width in WIDTHS.items()]
    assert main(["evaluate", "joined"]) == 0
    assert main(["store", "stats", "both"]) == 0


def test_rows_and_statistics_are_those_of_the_parts(two):
    assert join(two) == 0
    both, parts = stores.open(storage.open("both")), {m: stores.open(storage.open(uri)) for m, uri in two.items()}
    hooks = [f"{model}.resid_post.3" for model in WIDTHS]
    rows = torch.cat([part.x for part in unit_rows(both, hooks, 2, 128)])
    alone = [torch.cat([part.x for part in unit_rows(parts[m], "resid_post.3", 2, 128)]) for m in WIDTHS]
    assert torch.equal(rows, torch.cat(alone, 1))
    for model, part in parts.items():
        found, expected = both.statistics(f"{model}.resid_post.3"), part.statistics("resid_post.3")
        assert found.n == expected.n and np.array_equal(found.mean, expected.mean)


def test_parts_may_move(two, tmp_path, capsys):
    assert join(two) == 0
    digest = stores.open(storage.open("both")).meta.digest
    Path(two["base"]).rename(tmp_path / "elsewhere")
    assert main(["store", "ls", "both"]) == 2
    assert "base holds no store.json" in capsys.readouterr().err
    assert join(two | {"base": str(tmp_path / "elsewhere")}) == 0
    assert stores.open(storage.open("both")).meta.digest == digest
    write(Path(two["base"]), {"resid_post.3": "base"}, seed=5)
    assert join(two) == 2  # another store: another join
    assert "both holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": 1}, "differ in their token, so that they are not of the same tokens; unit 0 of the stores"),
        ({"left_out": 2}, "unit 1 has 300 rows in {base} and 298 in {other}, so that they do not correspond"),
        ({"slice_rows": 100}, "parts.base has slice_rows=128 and parts.other has slice_rows=100"),
        (
            {"units": 3},
            "parts.other={other} lacks 1 of its 4 units (unit 3 first); join stores once they are harvested",
        ),
    ],
)
def test_rows_that_do_not_correspond_are_refused(two, tmp_path, capsys, changes, message):
    other = write(tmp_path / "other", {"resid_post.3": "chat"}, **changes)
    assert join({"base": two["base"], "other": other}) == 2
    assert message.format(base=two["base"], other=other) in " ".join(capsys.readouterr().err.split())
    assert not Path("both").exists()


def test_what_a_join_has_not_is_said(two, capsys):
    assert join(two) == 0
    for keys in (["verify"], ["gc"], ["copy", "to=there"]):
        assert main(["store", *keys, "store=both"]) == 2
        assert "store=both is a join and holds no rows" in capsys.readouterr().err
    assert join({"a": "both", "b": two["base"]}, "again") == 2
    assert "is a join itself; name the stores that it joins" in capsys.readouterr().err
    places = Path("both/parts.json")
    places.write_bytes(records.seal({"uris": dict.fromkeys(two, str(places.parent.absolute()))}))
    assert main(["store", "ls", "both"]) == 2  # a join that names itself
    assert "part base of store=" in capsys.readouterr().err
    assert join({"base": two["base"]}, "again") == 2
    assert "parts names 1 stores; join two or more" in capsys.readouterr().err
