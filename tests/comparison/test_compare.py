"""sae-dist compare, as a person types it: on stores, dictionaries and a run on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import sae_dist
from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.shards import stores
from sae_dist.shards.reader import heldout

D = 8
ORDER = torch.tensor([3, 0, 5, 1, 7, 2, 6, 4])


def saved(folder: Path, W_dec: torch.Tensor, *, k: int, hook: str = "imported") -> Path:
    """A dictionary whose latents are active where their direction is."""
    info = {"variant": "topk", "hook": hook, "d_model": D, "model": "imported"}
    parameters = Parameters(W_dec.T.contiguous(), W_dec, torch.zeros(len(W_dec)), torch.zeros(D))
    dictionary_file.save(Dictionary(parameters=parameters, k=k, info=info), folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Rows that are sums of two of eight directions, a run on them, and dictionaries of these directions.

    In `narrow`, one latent stands for the directions 0 and 1; none stands for 7.
    """
    folder, rng = tmp_path_factory.mktemp("compared"), np.random.default_rng(0)
    chosen = np.argsort(rng.random((2000, D)), axis=1)[:, :2]
    rows = np.zeros((2000, D), np.float32)
    np.put_along_axis(rows, chosen, 1 + rng.random((2000, 2), np.float32), 1)
    both = chosen == 5
    rows[both.any(1), 6] = 1 + rows[both.any(1), 5]  # 6 fires wherever 5 does
    np.save(folder / "acts.npy", rows)
    np.save(folder / "other.npy", rng.permutation(rows)[:1000])
    np.save(folder / "turned.npy", rows[:, ::-1].copy())
    stores = (("acts", "store", "imported"), ("other", "other", "imported"), ("turned", "turned", "layer.2"))
    for source, name, hook in stores:
        make = ["store", "import", f"path={folder}/{source}.npy", f"store={folder}/{name}", f"hook={hook}"]
        assert main([*make, "heldout_fraction=0.25"]) == 0
    train = ["train", f"store={folder}/store", "sae.n_latents=16", "sae.k=2", "train.steps=5", "train.batch=128",
             "train.init_rows=256", "wandb.mode=disabled", f"out={folder}/run"]  # fmt: skip
    assert main(train) == 0
    eye = torch.eye(D)
    saved(folder / "whole", eye, k=3)
    saved(folder / "permuted", eye[ORDER], k=3)
    narrow = torch.cat([torch.nn.functional.normalize(eye[:1] + eye[1:2]), eye[2:7]])
    saved(folder / "narrow", narrow, k=3)
    saved(folder / "of_turned", eye.flip(1), k=3, hook="layer.2")
    return folder


def compare(world: Path, *words: str, out: Path) -> dict:
    places = [word if "=" in word or word.startswith("neurons") else str(world / word) for word in words]
    assert main(["compare", *places, f"out={out}"]) == 0
    return json.loads((out / "compare.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dictionary_and_its_permuted_copy_share_every_latent(world, tmp_path, capsys):
    found = compare(world, "whole", "permuted", f"store={world}/store", out=tmp_path / "out")
    (pair,) = found["pairs"]
    for own in pair["matches"]:
        for measure in ("correlation", "cosine"):
            assert own[measure]["found"]["quantiles"] == pytest.approx(
                dict.fromkeys(["0.05", "0.25", "0.5", "0.75", "0.95"], 1)
            )
            assert own[measure]["matched"]["found"] == own[measure]["mutual"] == {"latents": 1, "firings": 1}
        assert own["correlation"]["chance"]["quantiles"]["0.95"] < 0.3
        assert own["correlation"]["matched"]["chance"]["latents"] == 0
    assert pair["splitting"]["one_to_one"] == D and pair["splitting"]["novel"] == 0
    stages = pair["stitching"]["stages"]
    assert stages["stitched"]["fvu"] == pytest.approx(stages["smaller"]["fvu"], abs=1e-6)
    rows = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    assert [row["match"] for row in rows if row["dictionary"] == "B"] == ORDER.tolist()
    said = capsys.readouterr().out
    assert "B in A: best decoder cosine, median 1.000 (by chance" in said and "0.7 or more 100.0%" in said
    assert f"page: {tmp_path / 'out' / 'index.html'}" in said
    assert "permuted" in (tmp_path / "out" / "index.html").read_text()


def test_a_planted_split_and_what_is_novel_are_found_and_fill_the_gap(world, tmp_path):
    found = compare(world, "whole", "narrow", f"store={world}/store", out=tmp_path / "out")
    (pair,) = found["pairs"]
    assert (pair["smaller"], pair["larger"]) == ("B", "A")
    assert {key: pair["splitting"][key] for key in ("one_to_one", "split", "novel")} == {
        "one_to_one": 5, "split": 1, "novel": 1}  # fmt: skip
    rows = pq.read_table(tmp_path / "out" / "splits.parquet").to_pylist()
    assert [sorted(row["children"]) for row in rows] == [[0, 1], [2], [3], [4], [5], [6]]
    stages = {name: each["fvu"] for name, each in pair["stitching"]["stages"].items()}
    assert stages["larger"] < 1e-6 and stages["stitched"] < 1e-6 < stages["swapped"] < stages["smaller"]
    assert stages["novel_added"] < stages["smaller"] - 0.05
    assert pair["stitching"]["improve_alone"]["novel"] == 1
    matches = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    assert [row["latent"] for row in matches if row["novel"]] == [7]


def test_one_dictionary_alone_latents_that_fire_together(world, tmp_path, capsys):
    found = compare(world, "whole", f"store={world}/store", out=tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "partners.parquet").to_pylist()
    assert rows[5]["partners"][0] == 6 and rows[6]["partners"][0] == 5
    assert found["coactivation"]["correlation"]["chance"]["quantiles"]["0.95"] < 0.3
    assert "<td>5</td>" in (tmp_path / "out" / "index.html").read_text()
    assert "strongest partner of a latent: median r" in capsys.readouterr().out
    assert not (tmp_path / "out" / "matches.parquet").exists()


def test_other_activations_of_the_same_tokens_are_correlated_alone(world, tmp_path):
    places = ["whole", "of_turned"]
    shutil.copytree(world / "run", tmp_path / "a")
    shutil.copytree(world / "run", tmp_path / "b")
    for name, place in zip(("a", "b"), places, strict=True):  # as runs, which say what their stores are
        shutil.rmtree(tmp_path / name / "dictionary")
        shutil.copytree(world / place, tmp_path / name / "dictionary")
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary | {"store": str(world / "turned")}))
    found = compare(tmp_path, "a", "b", out=tmp_path / "out")
    (pair,) = found["pairs"]
    assert pair["match"] == "correlation" and set(pair["not_measured"]) == {
        "stitching", "cosine", "virtual_weights"}  # fmt: skip
    for own in pair["matches"]:
        assert "cosine" not in own and own["correlation"]["found"]["quantiles"]["0.05"] == pytest.approx(1)
    assert pair["stitching"] is None and "Not measured" in (tmp_path / "out" / "index.html").read_text()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "match=cosine", f"out={tmp_path}/no"]) == 2


def test_two_hook_points_of_one_store(world, tmp_path):
    both = tmp_path / "both"
    parts = f"parts={{one: {world}/store, two: {world}/turned}}"
    assert main(["store", "join", f"store={both}", parts]) == 0
    places = [
        str(saved(tmp_path / "one", torch.eye(D), k=3, hook="one.imported")),
        str(saved(tmp_path / "two", torch.eye(D)[ORDER].flip(1), k=3, hook="two.layer.2")),
    ]
    assert main(["compare", *places, f"store={both}", f"out={tmp_path}/out"]) == 0
    rows = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    assert [row["match"] for row in rows if row["dictionary"] == "B"] == ORDER.tolist()
    assert all(row["r"] > 0.999 and row["nearest"] is None and row["cosine"] is None for row in rows)


def test_latents_of_a_later_layer_are_fed_by_those_of_an_earlier(world, tmp_path, capsys):
    rows = np.load(world / "acts.npy")
    later = rows.copy()
    later[:, 7] *= 2  # of which layers between add half
    for name, x, hook in (("early", rows, "resid_post.1"), ("late", later, "resid_pre.4")):
        np.save(tmp_path / f"{name}.npy", x)
        make = ["store", "import", f"path={tmp_path}/{name}.npy", f"store={tmp_path}/{name}", f"hook={hook}"]
        assert main([*make, "model=a-model", "heldout_fraction=0.25"]) == 0
        shutil.copytree(world / "run", tmp_path / f"run_{name}", ignore=shutil.ignore_patterns("dictionary"))
        saved(tmp_path / f"run_{name}" / "dictionary", torch.eye(D)[ORDER] if name == "late" else torch.eye(D), k=3,
              hook=hook)  # fmt: skip
        summary = tmp_path / f"run_{name}" / "summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"store": str(tmp_path / name)}))
    found = compare(tmp_path, "run_late", "run_early", out=tmp_path / "out")
    (pair,) = found["pairs"]
    weights = pair["virtual_weights"]
    assert (weights["earlier"], weights["later"], weights["heaviest_apart"]) == ("B", "A", 0)
    assert weights["carried"]["quantiles"]["0.05"] == pytest.approx(0.5)
    assert weights["carried"]["quantiles"]["0.25"] == pytest.approx(1)
    assert weights["foremost"]["chance"]["quantiles"]["0.95"] < 0.2
    table = pq.read_table(tmp_path / "out" / "inputs.parquet").to_pylist()
    assert [row["raised_by"][0] for row in table] == ORDER.tolist()
    for row in table:
        assert row["weight"][0] == row["heaviest_weight"] == 1 and row["heaviest"] == ORDER[row["latent"]]
        assert row["carried"] / row["rise"] == pytest.approx(0.5 if row["heaviest"] == 7 else 1)
        assert row["supply"][0] == pytest.approx(row["by_latents"]) == pytest.approx(row["carried"])
    said = capsys.readouterr().out
    assert "in the median 100.0% is in the stream at B, 100.0% is supplied by latents of B, 100.0% by the" in said
    assert "What feeds latents of A" in (tmp_path / "out" / "index.html").read_text()


def test_neurons_stand_beside_the_latents_that_read_them(world, tmp_path, capsys):
    """A latent that is one neuron has r = cosine = 1 with it; one of two directions has what numpy says."""
    found = compare(world, "narrow", "neurons", f"store={world}/store", out=tmp_path / "out")
    (pair,), (_, neurons) = found["pairs"], found["dictionaries"]
    assert (neurons["where"], neurons["variant"], neurons["n_latents"]) == ("neurons of imported", "neurons", D)
    assert pair["not_measured"]["stitching"] == "neurons rebuild every row as it is" and pair["stitching"] is None
    rows = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    latents = [row for row in rows if row["dictionary"] == "A"]
    assert [row["match"] for row in latents[1:]] == [row["nearest"] for row in latents[1:]] == [2, 3, 4, 5, 6]
    assert [row["r"] for row in latents[1:]] == pytest.approx([1] * 5)
    assert [row["cosine"] for row in latents] == pytest.approx([0.5**0.5, 1, 1, 1, 1, 1])
    store = stores.open(storage.open(world / "store"))
    x = np.concatenate([rows.x.float().numpy() for rows in heldout(store, "imported", 4096)])
    r = np.corrcoef((x[:, 0] + x[:, 1]) / 2**0.5, x[:, latents[0]["match"]])[0, 1]
    assert latents[0]["match"] in (0, 1) and latents[0]["r"] == pytest.approx(r, abs=1e-6)
    assert "B: neurons of imported, 8 neurons, of which 0 never fire" in capsys.readouterr().out
    named = sae_dist.compare(world / "narrow", "neurons:imported", store=f"{world}/store")
    assert named.matches.equals(pq.read_table(tmp_path / "out" / "matches.parquet"))


def test_trees_over_three_widths_and_the_same_from_python(world, tmp_path):
    saved(tmp_path / "wide", torch.cat([torch.eye(D), torch.eye(D)[:2] + 0.3]), k=4)
    places = [str(place) for place in (world / "narrow", world / "whole", tmp_path / "wide")]
    assert main(["compare", *places, f"store={world}/store", f"out={tmp_path}/out"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "A → B → C" in page and "<li>A/0<ul><li>B/" in page
    found = sae_dist.compare(places[0], sae_dist.load(places[1]), store=world / "store", tokens=100)
    assert found.figures["rows"] == 100 and found.figures["pairs"][0]["splitting"]["split"] == 1
    assert not list(tmp_path.glob("compared"))


def test_a_run_knows_its_store_and_one_without_a_store_takes_the_others(world, tmp_path):
    found = compare(world, "whole", "run", "tokens=300", out=tmp_path / "out")
    assert [each["store"] for each in found["dictionaries"]] == [f"{world}/store"] * 2
    assert found["rows"] == 300 and found["settings"]["tokens"] == 300


def test_the_same_command_gives_the_same_bytes(world, tmp_path):
    words = [f"{world}/whole", f"{world}/narrow", f"store={world}/store"]
    assert main(["compare", *words, f"out={tmp_path}/out"]) == 0
    first = contents(tmp_path / "out")
    assert set(first) == {"index.html", "compare.json", "matches.parquet", "splits.parquet", "site.css", "compare.css"}
    assert main(["compare", *words, f"out={tmp_path}/out"]) == 0
    assert contents(tmp_path / "out") == first


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_half_written_and_repeats(world, tmp_path):
    words = [f"{world}/whole", f"{world}/narrow", f"store={world}/store"]
    assert main(["compare", *words, f"out={tmp_path}/out"]) == 0
    first = contents(tmp_path / "out")
    (tmp_path / "scratch").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_dist", "compare", *words, f"out={tmp_path}/killed"],
        env=os.environ | {"TMPDIR": str(tmp_path / "scratch")}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "scratch").glob("sae_dist_compare_*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = contents(tmp_path / "killed") if (tmp_path / "killed").exists() else {}
    assert {name: whole for name, whole in left.items() if first.get(name) != whole} == {}
    assert main(["compare", *words, f"out={tmp_path}/killed"]) == 0
    assert contents(tmp_path / "killed") == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{world}/run", "{world}/nothing"], "{world}/nothing"),
        (["{world}/whole"], "{world}/whole does not lie in a run's folder"),
        ([], "dictionaries is missing; set dictionaries="),
        (
            ["{world}/whole", "store={world}/nowhere"],
            "store={world}/nowhere, whose rows {world}/whole is to read, is not",
        ),
        (["{world}/whole", "store={world}/turned"], "hook=imported is not in store={world}/turned"),
        (["{world}/whole", "store={world}/store", "level=2"], "level=2"),
        (["neurons", "store={world}/store"], "neurons does not say of which hook point; write neurons:HOOK"),
        (["neurons:mlp.1", "store={world}/store"], "hook=mlp.1 is not in store={world}/store, which neurons:mlp.1"),
        (["neurons:imported"], "neurons:imported does not lie in a run's folder"),
        (["{tmp}/elsewhere", "{world}/run"], "held-out row 0 is token 0 at position 0 of document"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world, tmp_path, capsys, words, message):
    shutil.copytree(world / "run", tmp_path / "elsewhere")
    summary = json.loads((tmp_path / "elsewhere" / "summary.json").read_text())
    (tmp_path / "elsewhere" / "summary.json").write_text(json.dumps(summary | {"store": f"{world}/other"}))
    code = main(["compare", *(word.format(world=world, tmp=tmp_path) for word in words), f"out={tmp_path}/out"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(said) == 1 and message.format(world=world) in said[0]
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_page_is_found_before_the_work(world, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["compare", f"{world}/run", f"out={tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert f"error: out={tmp_path}/out is not a folder" in said and "encoded" not in said
    assert (tmp_path / "out").read_text() == "mine"
