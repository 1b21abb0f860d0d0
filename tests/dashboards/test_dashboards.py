"""What other tools are shown of latents, against the feature data that it is made of."""

import dataclasses
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sae_dist
from sae_dist import dashboards
from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.service.summary import weights_digest
from tests.formats.test_tools import ran
from tests.interpret.test_features import CONTEXT, D_MODEL, N_LATENTS, ROWS, W_DEC, write

LATENT = 17
TAKES = """
import json, sys
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
files = [json.load(open(name)) for name in sys.argv[1:]]
taken = [NeuronpediaDashboardBatch(**own) for own in files]
assert [each.to_dict() for each in taken] == files
features = [feature for each in taken for feature in each.features]
print(len(taken), len(features), sum(len(feature.activations) for feature in features))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with a dictionary, its feature data and labels."""
    out = tmp_path_factory.mktemp("shown") / "run"
    parameters = Parameters(W_DEC.clone().T, W_DEC, torch.zeros(N_LATENTS), torch.zeros(D_MODEL))
    info = {"variant": "topk", "hook": "resid_post.3", "model": "someone/Tiny", "d_model": D_MODEL}
    dictionary_file.save(Dictionary(parameters=parameters, k=3, info=info), out / "dictionary")
    write(out, weights=weights_digest(out / "dictionary"))
    config = {"harvest": {"context": CONTEXT}, "text": {"kind": "jsonl", "path": "text.jsonl"}}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    alive = [row["latent"] for row in sae_dist.features(out).read(range(40)).to_pylist() if row["firings"]]
    assert main(["label", str(out), f"label.latents={alive}"]) == 0
    return out


def batches(folder: Path) -> list[dict]:
    """SAEDashboard's files, in their order."""
    return [json.loads((folder / f"batch-{at}.json").read_text()) for at in range(-(-N_LATENTS // 128))]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_saedashboard_is_told_what_feature_data_has(run, tmp_path, capsys):
    assert main(["export", str(run), "format=saedashboard", f"to={tmp_path}"]) == 0
    assert f"6 files in {tmp_path}" in capsys.readouterr().out
    own = batches(tmp_path)
    head = [{key: batch[key] for key in ("model_id", "layer", "sae_set", "sae_id_suffix")} for batch in own]
    assert head == [{"model_id": "tiny", "layer": 3, "sae_set": "res-600", "sae_id_suffix": None}] * 5
    shown = {each["feature_index"]: each for batch in own for each in batch["features"]}
    found = sae_dist.features(run)
    table = found.read(range(N_LATENTS)).to_pylist()
    silent = [row["latent"] for row in table if not row["firings"]]
    assert json.loads((tmp_path / "skipped_indexes.json").read_text())["skipped_indexes"] == silent
    assert sorted([*shown, *silent]) == list(range(N_LATENTS))
    row, each = table[LATENT], shown[LATENT]
    assert each["frac_nonzero"] == row["density"] and each["n_prompts_total"] == ROWS // CONTEXT
    assert each["freq_hist_data_bar_heights"] == row["histogram"] and each["dataset"] == "text.jsonl"
    middles = (np.arange(64) + 0.5) / 64 * row["histogram_end"]
    np.testing.assert_allclose(each["freq_hist_data_bar_values"], middles)
    texts = {token["token"]: token["text"] for token in found.tokens().to_pylist()}
    assert each["pos_str"] == [texts[token] or "�" for token in row["promoted"]]
    assert each["neg_values"] == row["suppressed_by"]
    np.testing.assert_allclose(each["vector"], W_DEC[LATENT], rtol=1e-5)
    assert each["neuron_alignment_indices"] == W_DEC[LATENT].topk(3).indices.tolist()
    shares = W_DEC[LATENT].topk(3).values.abs() / W_DEC[LATENT].abs().sum()
    np.testing.assert_allclose(each["neuron_alignment_l1"], shares, rtol=1e-5)
    for context, one in zip(row["contexts"], each["activations"], strict=True):
        assert one["tokens"] == [texts[token] or "�" for token in context["tokens"]]
        dense = np.zeros(len(context["tokens"]))
        dense[context["active"]] = context["activation"]
        np.testing.assert_allclose(one["values"], dense, rtol=1e-5)
        assert one["values"][one["qualifying_token_index"]] == pytest.approx(context["value"], rel=1e-5)
        if (at := context["interval"]) < 0:
            assert [one[f"bin_{name}"] for name in ("min", "max", "contains")] == [-1, row["max"], -1]
        else:
            assert [one["bin_min"], one["bin_max"]] == row["interval_edges"][at : at + 2]
            assert one["bin_contains"] == row["interval_firings"][at] / row["firings"]


def test_neuronpedia_has_the_same_in_its_layout_with_labels(run, tmp_path):
    words = ["format=neuronpedia", f"to={tmp_path}", "model_name=tiny-v2", "set_name=mine-res"]
    assert main(["export", str(run), *words]) == 0
    folder = tmp_path / "tiny-v2" / "3-mine-res"
    assert {path.name for path in folder.iterdir()} == {
        "activations", "explanations", "features", "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl"
    }  # fmt: skip
    source = json.loads((folder / "source.jsonl").read_text())
    assert (source["id"], source["modelId"], source["setName"]) == ("3-mine-res", "tiny-v2", "mine-res")
    features, activations, explanations = (
        rows(folder / kind / "batch-0.jsonl.gz") for kind in ("features", "activations", "explanations")
    )
    table = {row["latent"]: row for row in sae_dist.features(run).read(range(N_LATENTS)).to_pylist()}
    assert {int(each["index"]) for each in features} == {latent for latent, row in table.items() if row["firings"]}
    assert all((each["modelId"], each["layer"]) == ("tiny-v2", "3-mine-res") for each in [*features, *activations])
    assert len(activations) == sum(len(row["contexts"]) for row in table.values())
    assert len({each["id"] for each in activations}) == len(activations)
    for each in activations[:200]:
        assert each["maxValue"] == max(each["values"]) == each["values"][each["maxValueTokenIndex"]]
    labels = sae_dist.labels(run)
    assert {int(each["index"]): each["description"] for each in explanations} == dict(labels)
    assert all(each["typeName"] == "offline" for each in explanations) and explanations


def test_circuit_tracer_finds_each_latent_by_its_bytes(run, tmp_path):
    bin_file, index_file = dashboards.export(run, tmp_path, format="circuit_tracer_features")
    index = json.loads(gzip.decompress(index_file.read_bytes()))
    assert [layer["filename"] for layer in index] == ["", "", "", "layer_3.bin"] and bin_file.name == "layer_3.bin"
    offsets, data = index[3]["offsets"], bin_file.read_bytes()
    assert len(offsets) == N_LATENTS + 1 and offsets[-1] == len(data)

    def at(latent: int) -> dict:
        record = data[offsets[latent] : offsets[latent + 1]]
        assert int.from_bytes(record[:4], "little") == len(record) - 4
        return json.loads(zlib.decompress(record[4:]))

    table = sae_dist.features(run).read(range(N_LATENTS)).to_pylist()
    for row in table:
        found = at(row["latent"])
        assert (found["index"], found["activation_frequency"]) == (row["latent"], row["density"])
        assert found["act_max"] == row["max"]
        examples = [example for group in found["examples_quantiles"] for example in group["examples"]]
        for context, example in zip(row["contexts"], examples, strict=True):
            assert example["train_token_ind"] == context["at"] and len(example["tokens"]) == len(context["tokens"])
            peak = example["tokens_acts_list"][context["at"]]
            assert peak == pytest.approx(context["value"], rel=1e-5)
    assert at(LATENT)["examples_quantiles"][0]["quantile_name"] == "Strongest"


def test_layers_of_several_runs_go_into_one_folder_of_circuit_tracer(run, tmp_path):
    other = tmp_path / "other"
    own = dictionary_file.load(run / "dictionary")
    dictionary_file.save(dataclasses.replace(own, info={**own.info, "hook": "resid_post.1"}), other / "dictionary")
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    (other / "features").symlink_to(run / "features")
    for each in (run, other, run):
        list(dashboards.export(each, tmp_path / "to", format="circuit_tracer_features"))
    index = json.loads(gzip.decompress((tmp_path / "to/features/index.json.gz").read_bytes()))
    assert [layer["filename"] for layer in index] == ["", "layer_1.bin", "", "layer_3.bin"]
    (tmp_path / "to/features/index.json.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="index.json.gz is damaged; remove it"):
        list(dashboards.export(run, tmp_path / "to", format="circuit_tracer_features"))


@pytest.mark.parametrize("format", ["saedashboard", "neuronpedia"])
def test_no_file_says_where_model_and_text_lie(run, tmp_path, format):
    own, other = dictionary_file.load(run / "dictionary"), tmp_path / "other"
    local = dataclasses.replace(own, info={**own.info, "model": "/home/alice/Acme-ft"})
    dictionary_file.save(local, other / "dictionary")
    text = {"kind": "jsonl", "path": "/home/alice/clients/mails.jsonl"}
    (other / "config.yaml").write_text(yaml.safe_dump({"harvest": {"context": CONTEXT}, "text": text}))
    (other / "features").symlink_to(run / "features")
    written = list(dashboards.export(other, tmp_path / "to", format=format))
    said = b"".join((gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()) for path in written)
    assert b"acme-ft" in said and b"mails.jsonl" in said
    assert b"alice" not in said and b"clients" not in said


@pytest.mark.slow
def test_saedashboard_takes_its_files(run, tmp_path):
    list(dashboards.export(run, tmp_path / "to", format="saedashboard"))
    said = ran("saedashboard", "-c", TAKES, *sorted((tmp_path / "to").glob("batch-*.json")))
    shown = [latent for batch in batches(tmp_path / "to") for latent in batch["features"]]
    assert said.split() == ["5", str(len(shown)), str(sum(len(latent["activations"]) for latent in shown))]


@pytest.mark.parametrize("format", [name for name in dashboards.FORMATS if name != "delphi"])
def test_after_a_stop_it_goes_on_and_gives_the_same_bytes(run, tmp_path, format):
    whole = list(dashboards.export(run, tmp_path / "whole", format=format))
    stopped = dashboards.export(run, tmp_path / "parts", format=format)
    first = [next(stopped)]
    stopped.close()
    began = [path.stat().st_mtime_ns for path in first]
    again = list(dashboards.export(run, tmp_path / "parts", format=format))
    assert [path.stat().st_mtime_ns for path in first] == began
    names = [path.relative_to(tmp_path / "whole") for path in whole]
    assert [path.relative_to(tmp_path / "parts") for path in again] == names
    assert all((tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    again[0].write_text("mine")
    with pytest.raises(UserError, match="has another .* already; give an empty folder"):
        list(dashboards.export(run, tmp_path / "parts", format=format))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=saedashboard", "hook_name=x"], "hook_name means nothing to format=saedashboard"),
        (["format=neuronpedia", "dry_run=true"], "dry_run means nothing to format=neuronpedia"),
        (["format=neuronpedia", "set_name=../up"], "set_name=../up cannot be a name there"),
        (["format=saelens", "set_name=x"], "set_name=x means nothing to format=saelens"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, message):
    assert main(["export", str(run), f"to={tmp_path}/to", *words]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "to").exists()


def test_what_has_no_feature_data_or_that_of_other_weights_is_refused(run, tmp_path):
    own = dictionary_file.load(run / "dictionary")
    for name, said in (("bare", "features.json is missing"), ("other", "is of other weights than")):
        folder = tmp_path / name
        changed = own.parameters._replace(b_enc=torch.ones(N_LATENTS))
        dictionary_file.save(Dictionary(parameters=changed, k=3, info=own.info), folder / "dictionary")
        (folder / "config.yaml").write_text((run / "config.yaml").read_text())
        if name == "other":
            (folder / "features").symlink_to(run / "features")
        with pytest.raises(UserError, match=said):
            list(dashboards.export(folder, tmp_path / "to", format="saedashboard"))
    with pytest.raises(UserError, match="is no run's folder"):
        list(dashboards.export(run / "dictionary", tmp_path / "to", format="saedashboard"))
