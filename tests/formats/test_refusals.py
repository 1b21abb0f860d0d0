"""Files that are malformed or do not say enough are refused with the reason, and nothing in them is run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import sae_dist
from sae_dist import formats
from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from tests.formats.dictionaries import cross_layer, dictionary
from tests.formats.test_formats import llama_scope_files, published

Break = Callable[[Path], dict]  # makes a file in a folder and says what is told of it
GPT2 = {"model": "gpt2", "hook": "resid_post.3"}


def saelens(
    tensors: Callable[[dict], dict] = dict, drop: tuple[str, ...] = (), told: dict | None = None, **cfg
) -> Break:  # fmt: skip
    """An exported SAELens folder with other tensors or keys of cfg.json."""

    def make(folder: Path) -> dict:
        formats.export(dictionary("jumprelu"), folder, format="saelens")
        weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
        own = tensors(load_file(weights))
        weights.unlink()
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, weights)
        values = json.loads(config.read_text()) | cfg
        config.write_text(json.dumps({key: value for key, value in values.items() if key not in drop}))
        return told or {}

    return make


def sparsify(**cfg) -> Break:
    def make(folder: Path) -> dict:
        formats.export(dictionary("topk"), folder, format="sparsify")
        config = folder / "cfg.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | cfg))
        return GPT2

    return make


def dictionary_learning(change: Callable[[dict], dict], kind: str = "BatchTopKSAE") -> Break:
    def make(folder: Path) -> dict:
        formats.export(dictionary("topk"), folder, format="dictionary_learning")
        torch.save(change(torch.load(folder / "ae.pt", weights_only=True)), folder / "ae.pt")
        config = folder / "config.json"
        config.write_text(config.read_text().replace("AutoEncoderTopK", kind))
        return {}

    return make


def gemma_scope(told: dict, **arrays) -> Break:
    def make(folder: Path) -> dict:
        own = {name: tensor.numpy() for name, tensor in published().items()} | arrays
        np.savez(folder / "params.npz", **own)
        return told

    return make


def gemma_scope_2(told: dict, tensors: dict | None = None, **config) -> Break:
    def make(folder: Path) -> dict:
        own = {name.lower(): tensor for name, tensor in published().items()} | (tensors or {})
        save_file(own, folder / "params.safetensors")
        if config:
            (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "m", **config}))
        return told

    return make


def circuit_tracer(**config) -> Break:
    def make(folder: Path) -> dict:
        formats.export(dictionary("topk", transcodes=True), folder, format="circuit_tracer")
        about = folder / "config.yaml"
        about.write_text(yaml.safe_dump(yaml.safe_load(about.read_text()) | config))
        return {}

    return make


def clt(change: Callable[[dict[str, Path]], object]) -> Break:
    def make(folder: Path) -> dict:
        written = formats.export(cross_layer("jumprelu"), folder, format="circuit_tracer")
        change({path.stem: path for path in written})
        return {}

    return make


def without_threshold(files: dict[str, Path]) -> None:
    path = files["W_enc_1"]
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "threshold_1"}, path)


def llama_scope(told: dict, **config) -> Break:
    def make(folder: Path) -> dict:
        llama_scope_files(folder, **config)
        return {"model": "m", **told}

    return make


def openai(told: dict) -> Break:
    def make(folder: Path) -> dict:
        formats.export(dictionary("topk"), folder, format="openai")
        (folder / "autoencoder.pt").rename(folder / "file")
        return told

    return make


def qwen_scope(told: dict) -> Break:
    def make(folder: Path) -> dict:
        formats.export(dictionary("topk"), folder, format="qwen_scope")
        (folder / "layer3.sae.pt").rename(folder / "file")
        return told

    return make


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a file was run')",))


def bomb(folder: Path) -> dict:
    torch.save({"W_enc": Bomb()}, folder / "file")
    return {"model": "m"}


def bare_pickle(folder: Path) -> dict:
    (folder / "file").write_bytes(pickle.dumps({"W_enc": Bomb()}))
    return {"model": "m"}


def without(name: str) -> Callable[[dict], dict]:
    return lambda own: {key: tensor for key, tensor in own.items() if key != name}


def transposed(own: dict) -> dict:
    return own | {"W_enc": own["W_enc"].T}


def damaged(own: dict) -> dict:
    own["W_dec"][3, 2] = float("nan")
    return own


REFUSED = {
    "saelens: rows normalised one by one": (saelens(normalize_activations="layer_norm"), "changes every row by itself"),
    "saelens: a scale that is not there": (saelens(normalize_activations="expected_average_only_in"), "scale=..."),
    "saelens: a scale that contradicts": (saelens(told={"scale": 2.0}), "scale=2.0 was told, but"),
    "saelens: another architecture": (saelens(architecture="temporal"), "architecture=temporal cannot be read"),
    "saelens: no architecture": (saelens(drop=("architecture",)), "does not say its architecture"),
    "saelens: pre-bias or not": (saelens(drop=("apply_b_dec_to_input",)), "pre_bias=..."),
    "saelens: a hook point without a name here": (
        saelens(metadata={"sae_lens_version": "6.0.0", "hook_name": "blocks.3.attn.hook_z"}), "of which hook point",
    ),
    "saelens: no model": (
        saelens(metadata={"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post"}), "language model",
    ),
    "saelens: another hook point was told": (saelens(told={"hook": "resid_post.4"}), "hook=resid_post.4 was told, but"),
    "saelens: a tensor is missing": (saelens(without("threshold")), "lacks threshold"),
    "saelens: a tensor too many": (saelens(lambda own: own | {"r_mag": own["b_enc"].clone()}), "also has r_mag"),
    "saelens: transposed": (saelens(transposed), "W_enc is .* it is transposed"),
    "saelens: not a number": (saelens(damaged), "W_dec has numbers that are not finite"),
    "sparsify: another activation": (sparsify(activation="groupmax"), "activation=groupmax"),
    "sparsify: signed": (sparsify(signed=True), "signed=true"),
    "sparsify: sizes contradict": (sparsify(num_latents=48), "where cfg.json says"),
    "sparsify: a transcoder of what": (sparsify(transcode=True), "target_hook=..."),
    "dictionary_learning: no threshold yet": (dictionary_learning(dict), "was never set"),
    "dictionary_learning: a nested checkpoint": (
        dictionary_learning(lambda own: {"step": 5, "ae": own, "norm_factor": 0.1}), "has not ended",
    ),
    "dictionary_learning: another class": (dictionary_learning(dict, "IdentityDict"), "dict_class=IdentityDict"),
    "circuit_tracer: another kind": (circuit_tracer(model_kind="crosscoder"), "transcoder_set or a cross_layer_trans"),
    "circuit_tracer: a cross-layer transcoder's name on other files": (
        circuit_tracer(model_kind="cross_layer_transcoder"), "has no W_enc_0.safetensors",
    ),
    "circuit_tracer: a layer is missing": (clt(lambda own: own["W_enc_1"].unlink()), "has no W_enc_1.safetensors"),
    "circuit_tracer: a matrix of another layer": (
        clt(lambda own: own["W_dec_0"].write_bytes(own["W_dec_1"].read_bytes())), "lacks W_dec_0",
    ),
    "circuit_tracer: thresholds of some layers": (clt(without_threshold), "2 of 3 layers have thresholds"),
    "circuit_tracer: a hook point without a name": (circuit_tracer(feature_input_hook="mlp.hook_in"), "hook point"),
    "gemma_scope: of what": (gemma_scope({"model": "m"}), "of which hook point"),
    "gemma_scope: pickled": (gemma_scope(GPT2, threshold=np.array([{}], dtype=object)), "plain arrays"),
    "gemma_scope: a factor": (gemma_scope(GPT2, scaling_factor=np.array([2.0])), "scaling_factor"),
    "gemma_scope_2: of what": (gemma_scope_2({"model": "m"}), "of which hook point"),
    "gemma_scope_2: cross-layer": (gemma_scope_2(GPT2, {"w_dec": torch.zeros(40, 3, 12)}), "cross-layer"),
    "gemma_scope_2: an input has no name": (
        gemma_scope_2({}, hf_hook_point_in="model.layers.3.self_attn.o_proj.input"), "of which hook point",
    ),
    "llama_scope: which units": (llama_scope({}), "threshold_units=..."),
    "llama_scope: another activation": (llama_scope({}, act_fn="topk"), "act_fn=topk"),
    "openai: which rows": (openai(GPT2), "scale=..."),
    "qwen_scope: how many": (qwen_scope(GPT2), "k=..."),
    "qwen_scope: code": (bomb, "could run code"),
    "qwen_scope: a bare pickle": (bare_pickle, "is no file of torch.save"),
    "qwen_scope: a key that it does not use": (qwen_scope({"scale": 2.0}), "scale means nothing to format=qwen_scope"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_say_enough_is_refused(tmp_path, case):
    make, said = REFUSED[case]
    format, file = case.partition(":")[0], tmp_path / "file"
    told = make(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        sae_dist.load(file if file.exists() else tmp_path, format=format, **told)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_nothing_and_damage_are_refused(tmp_path, format):
    for what in ("does not exist", " has |is no file"):
        with pytest.raises(UserError, match=what):
            sae_dist.load(tmp_path / "folder", format=format)
        (tmp_path / "folder").mkdir(exist_ok=True)


def test_the_commands_write_read_and_measure(tmp_path, capsys):
    both = torch.cat([torch.eye(12), -torch.eye(12)])  # with which any row is rebuilt
    parameters = Parameters(both.clone().T, both, torch.zeros(24), torch.full((12,), 3.0))
    info = {"variant": "topk", "hook": "resid_post.3", "model": "gpt2"}
    dictionary_file.save(Dictionary(parameters=parameters, k=12, info=info), tmp_path / "run" / "dictionary")
    assert main(["export", f"{tmp_path}/run", "format=saelens", f"to={tmp_path}/to"]) == 0
    assert f"{tmp_path}/to/cfg.json" in capsys.readouterr().out
    x = 3 + torch.randn(3000, 12, generator=torch.Generator().manual_seed(0))
    for name, hook in (("acts", "resid_post.3"), ("other", "resid_post.4")):
        np.save(tmp_path / f"{name}.npy", x.numpy())
        line = ["store", "import", f"path={tmp_path}/{name}.npy", f"store={tmp_path}/{name}", f"hook={hook}"]
        assert main(line) == 0
    line = ["import", "format=saelens", f"path={tmp_path}/to", f"out={tmp_path}/theirs"]
    assert main([*line, f"verify={tmp_path}/other"]) == 2
    assert "hook=resid_post.3 is not in" in capsys.readouterr().err
    assert main([*line, f"verify={tmp_path}/acts"]) == 0
    found = sae_dist.load(tmp_path / "theirs")
    assert found.info["imported"]["verified"]["fvu"] < 1e-9 and found.info["imported"]["format"] == "saelens"
    torch.testing.assert_close(found(x), x, rtol=1e-5, atol=1e-5)
    assert main(line) == 2
    assert "is not empty" in capsys.readouterr().err
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in published().items()})
    random = ["import", "format=gemma_scope", f"path={tmp_path}/params.npz", "hook=resid_post.3", "model=m"]
    assert main([*random, f"out={tmp_path}/wrong", f"verify={tmp_path}/acts"]) == 2
    assert "worse than the mean" in capsys.readouterr().err and not (tmp_path / "wrong").exists()
