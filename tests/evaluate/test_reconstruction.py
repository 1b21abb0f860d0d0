"""Metrics on held-out rows of any kind: a number, or null with the reason."""

import json

import numpy as np
import pytest
import torch

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.evaluate.metrics import measured, merged, unmeasured
from sae_dist.shards import writer
from sae_dist.shards.format import StoreMeta

WIDTH, GOOD = 8, 64


def held_out(kind: str) -> torch.Tensor:
    """Rows of the held-out unit."""
    rows = torch.randn(GOOD, WIDTH, generator=torch.Generator().manual_seed(1))
    match kind:
        case "one":
            return rows[:1]
        case "constant":
            return torch.full((GOOD, WIDTH), 0.7)
        case "nan":
            return torch.full((GOOD, WIDTH), torch.nan)
        case "some nan":
            return torch.cat([rows, torch.full((3, WIDTH), torch.nan)])
    return rows


def train(tmp_path, rows: torch.Tensor, *, keep: bool, heldout_units: int = 1) -> dict:
    """The summary of a short training on a store whose last unit holds `rows`."""
    policy = "keep" if keep else "drop"
    meta = StoreMeta(
        model="made", hooks={"h": WIDTH}, n_units=3, heldout_units=heldout_units, unit_rows=256, slice_rows=64,
        dtype="float32", row_policy=policy,
    )  # fmt: skip
    store = writer.create(storage.open(tmp_path / "store"), meta)
    for unit in range(3):
        x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(unit + 2)) if unit < 2 else rows
        ids = np.arange(len(x))
        writer.write_unit(store, unit, {"h": x}, doc=ids, pos=ids, token=ids, max_nonfinite=1)
    out = tmp_path / "run"
    assert main(["train", f"store={tmp_path / 'store'}", "sae.n_latents=32", "sae.k=4", "train.steps=3",
                 "train.batch=64", "train.init_rows=64", "wandb.mode=disabled", f"out={out}"]) == 0  # fmt: skip
    return json.loads((out / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.parametrize(
    ("kind", "keep", "tokens", "reason"),
    [
        ("one", False, 1, "the 1 held-out rows are all the same"),
        ("constant", False, GOOD, "the 64 held-out rows are all the same"),
        ("nan", False, 0, "the held-out units have no rows that are finite"),
        ("some nan", True, GOOD, None),
    ],
)
def test_a_figure_that_cannot_be_had_is_null_with_a_reason(tmp_path, capsys, kind, keep, tokens, reason):
    figures = train(tmp_path, held_out(kind), keep=keep)["eval"]
    assert figures["tokens"] == tokens
    assert figures["not_measured"].get("fvu") == reason
    assert (figures["fvu"] is None) == (reason is not None)
    assert (figures["l0"] is None) == (tokens == 0)
    assert figures["loss_recovered"] is None and "no language model" in figures["not_measured"]["loss_recovered"]
    assert (f"fvu is not measured: {reason}" in capsys.readouterr().out) == (reason is not None)
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_without_held_out_units_nothing_is_measured(tmp_path):
    figures = train(tmp_path, held_out("good"), keep=False, heldout_units=0)["eval"]
    assert figures["tokens"] is figures["fvu"] is None
    assert figures["not_measured"]["fvu"] == "the store has no held-out units"


def test_figures_that_are_measured_later_lose_their_reason():
    first = unmeasured(("a", "b"), "not yet")
    assert merged(first, measured({"a": 1.0, "c": float("inf")}, {})) == {
        "a": 1.0, "b": None, "c": None, "not_measured": {"b": "not yet", "c": "it is not finite"},
    }  # fmt: skip
