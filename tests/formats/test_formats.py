"""Other tools' files: what is written gives the same rows by the tool's formula, what is read too, the rest is refused.

Formulas are written here as the tools publish them. test_tools.py asks the tools themselves.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae_dist
from sae_dist import formats
from sae_dist.config import UserError
from sae_dist.sae import dictionary as dictionary_file
from tests.formats.dictionaries import LAYERS, ROWS, WIDTH, D, K, N, cross_layer, dictionary, largest, rebuilt

X = ROWS.double()


def close(found: Tensor, expected: Tensor) -> None:
    """The same rows to 1e-5 of their length."""
    assert ((found - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


def saelens(folder: Path) -> Tensor:
    cfg, own = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert not cfg["apply_b_dec_to_input"] and cfg["normalize_activations"] == "none"
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6  # else its reader takes another layout for it
    z = X @ own["W_enc"].double() + own["b_enc"]
    kind = cfg["architecture"].partition("_")[0]
    if kind in ("topk", "abstopk"):
        assert not cfg["rescale_acts_by_decoder_norm"]
        f = largest(z, cfg["k"], signed=kind == "abstopk")
    else:
        f = z.relu() * (z > own["threshold"]) if kind == "jumprelu" else z.relu()
    return f @ own["W_dec"].double() + own["b_dec"] + skipped(own)


def skipped(own: dict[str, Tensor]) -> Tensor:
    return X @ own["W_skip"].double().T if "W_skip" in own else torch.zeros_like(X)


def sparsify(folder: Path) -> Tensor:
    cfg, own = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    x = X if cfg["transcode"] else X - own["b_dec"]
    f = largest(x @ own["encoder.weight"].double().T + own["encoder.bias"], cfg["k"])
    return f @ own["W_dec"].double() + own["b_dec"] + skipped(own)


def dictionary_learning(folder: Path) -> Tensor:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    own = torch.load(folder / "ae.pt", weights_only=True)
    if trainer["dict_class"] == "JumpReluAutoEncoder":
        z = X @ own["W_enc"].double() + own["b_enc"]
        return (z * (z > own["threshold"])).relu() @ own["W_dec"].double() + own["b_dec"]
    bias = own["bias" if trainer["dict_class"] == "AutoEncoder" else "b_dec"]
    z = (X - bias) @ own["encoder.weight"].double().T + own["encoder.bias"]
    f = z.relu() if trainer["dict_class"] == "AutoEncoder" else largest(z, int(own["k"]))
    return f @ own["decoder.weight"].double().T + bias


def circuit_tracer(folder: Path) -> Tensor:
    config, own = yaml.safe_load((folder / "config.yaml").read_text()), load_file(folder / "layer_3.safetensors")
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("hook_resid_pre", "hook_mlp_out")
    z = X @ own["W_enc"].double().T + own["b_enc"]
    if config.get("activation") == "topk":
        f = largest(z, config["k"])
    else:
        f = z * (z > own.get("activation_function.threshold", 0))
    return f @ own["W_dec"].double() + own["b_dec"] + skipped(own)


def qwen_scope(folder: Path) -> Tensor:
    own = torch.load(folder / "layer3.sae.pt", weights_only=True)
    z = X @ own["W_enc"].double().T + own["b_enc"]
    values, places = z.topk(K)
    return torch.zeros_like(z).scatter(-1, places, values) @ own["W_dec"].double().T + own["b_dec"]


def openai(folder: Path) -> Tensor:
    own = torch.load(folder / "autoencoder.pt", weights_only=True)
    z = (X - own["pre_bias"]) @ own["encoder.weight"].double().T + own["latent_bias"]
    f = z.relu() if own["activation"] == "ReLU" else largest(z, own["activation_state_dict"]["k"])
    return f @ own["decoder.weight"].double().T + own["pre_bias"]


WRITTEN = [
    *((saelens, variant, False) for variant in ("topk", "abs_topk", "batchtopk", "matryoshka", "jumprelu", "gated",
                                                "relu", "relu_norm", "jumprelu_tanh")),
    *((saelens, variant, True) for variant in ("jumprelu", "relu", "batchtopk")),
    (sparsify, "topk", False), (sparsify, "topk", True),
    *((dictionary_learning, variant, False) for variant in ("topk", "batchtopk", "matryoshka", "jumprelu", "gated",
                                                            "relu", "relu_norm")),
    *((circuit_tracer, variant, True) for variant in ("topk", "batchtopk", "jumprelu", "relu", "gated")),
    (qwen_scope, "topk", False), (openai, "topk", False), (openai, "relu_norm", False),
]  # fmt: skip
NEEDED = {  # by format: what its files never say
    "sparsify": {"model": "gpt2", "hook": "resid_post.3"}, "qwen_scope": {"model": "gpt2", "k": K},
    "openai": {"model": "gpt2", "hook": "resid_post.3", "scale": 1.0},
}  # fmt: skip


def test_a_skip_connection_is_not_lost(tmp_path):
    for formula, variant in ((saelens, "relu"), (saelens, "jumprelu"), (sparsify, "topk"), (circuit_tracer, "topk")):
        own, to = dictionary(variant, transcodes=True, skip=True), tmp_path / formula.__name__ / variant
        formats.export(own, to, format=formula.__name__)
        close(formula(to), rebuilt(own))
        told = {"hook": "resid_pre.3", "target_hook": "mlp_out.3", "model": "gpt2"}
        found = sae_dist.load(to, format=formula.__name__, **told)
        close(found(ROWS).double(), rebuilt(own))
        dictionary_file.save(found.dictionary, tmp_path / "ours")
        close(sae_dist.load(tmp_path / "ours")(ROWS).double(), rebuilt(own))


@pytest.mark.parametrize(
    ("formula", "variant", "transcodes"), WRITTEN, ids=[f"{f.__name__}-{v}{'-transcoder' * t}" for f, v, t in WRITTEN]
)
def test_what_is_written_rebuilds_the_same_rows_there_and_back_here(tmp_path, formula, variant, transcodes):
    own, format = dictionary(variant, transcodes=transcodes), formula.__name__
    written = formats.export(own, tmp_path, format=format)
    expected = rebuilt(own)
    close(formula(tmp_path), expected)
    told = NEEDED.get(format, {})
    if format == "sparsify" and transcodes:
        told = {"model": "gpt2", "hook": "resid_pre.3", "target_hook": "mlp_out.3"}
    path = written[0] if format in ("qwen_scope", "openai") else tmp_path
    found = sae_dist.load(path, format=format, **told)
    close(found(ROWS).double(), expected)
    assert (found.hook, found.target_hook, found.model) == (own.info["hook"], own.info.get("target_hook"), "gpt2")
    dictionary_file.save(found.dictionary, tmp_path / "ours")
    close(sae_dist.load(tmp_path / "ours")(ROWS), found(ROWS))
    assert formats.export(own, tmp_path, format=format) == written  # the same again replaces nothing


@pytest.mark.parametrize(
    ("format", "variant", "transcodes", "said"),
    [("saelens", "topk", True, "transcoders with thresholds only"), ("sparsify", "batchtopk", False, "k largest"),
     ("sparsify", "abs_topk", False, "k largest"), ("dictionary_learning", "topk", True, "has no transcoders"),
     ("dictionary_learning", "abs_topk", False, "both signs"), ("circuit_tracer", "topk", False, "transcoders only"),
     ("qwen_scope", "jumprelu", False, "k largest"), ("openai", "jumprelu", False, "TopK and ReLU only"),
     ("gemma_scope", "jumprelu", False, "read only"), ("other", "topk", False, "format=other is not known")],
)  # fmt: skip
def test_what_a_tool_does_not_know_is_not_written(tmp_path, format, variant, transcodes, said):
    with pytest.raises(UserError, match=said):
        formats.export(dictionary(variant, transcodes=transcodes), tmp_path / "to", format=format)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("format", "given", "said"),
    [("sparsify", {"model_name": "x"}, "model_name=x means nothing to format=sparsify, which takes no names"),
     ("qwen_scope", {"hook_name": "x"}, "hook_name=x means nothing to format=qwen_scope"),
     ("openai", {"hook_name_out": "x"}, "hook_name_out=x means nothing to format=openai"),
     ("sae_dist", {"model_name": "x"}, "model_name=x means nothing to format=sae_dist"),
     ("dictionary_learning", {"model_name": "y", "hook_name": "x"}, "hook_name=x means .*, which takes model_name"),
     ("saelens", {"hook_name_out": "x"}, "hook_name_out=x is of transcoders")],
)  # fmt: skip
def test_a_name_that_the_files_do_not_say_is_refused(tmp_path, format, given, said):
    with pytest.raises(UserError, match=said):
        formats.export(dictionary("topk"), tmp_path / "to", format=format, **given)
    assert not (tmp_path / "to").exists()


def circuit_tracer_clt(folder: Path) -> Tensor:
    """Each layer's latents read that layer, and write it and all after it."""
    x, y = X.split(WIDTH, 1), [torch.zeros(len(X), WIDTH).double() for _ in range(LAYERS)]
    for layer in range(LAYERS):
        own = load_file(folder / f"W_enc_{layer}.safetensors") | load_file(folder / f"W_dec_{layer}.safetensors")
        own = {name.removesuffix(f"_{layer}"): tensor.double() for name, tensor in own.items()}
        z = x[layer] @ own["W_enc"].T + own["b_enc"]
        f = z * (z > own.get("threshold", 0))
        y[layer] += own["b_dec"]
        for later in range(layer, LAYERS):
            y[later] += f @ own["W_dec"][:, later - layer]
    return torch.cat(y, 1)


@pytest.mark.parametrize("variant", ["jumprelu", "batchtopk", "relu"])
def test_a_cross_layer_transcoder_is_written_layer_by_layer_and_read_back(tmp_path, variant):
    own = cross_layer(variant)
    written = formats.export(own, tmp_path / "clt", format="circuit_tracer")
    assert [path.name for path in written] == [
        *(f"{name}_{layer}.safetensors" for layer in range(LAYERS) for name in ("W_enc", "W_dec")), "config.yaml",
    ]  # fmt: skip
    config = yaml.safe_load(written[-1].read_text())
    assert config == {"model_name": "gpt2", "model_kind": "cross_layer_transcoder", "scan": "clt",
                      "feature_input_hook": "hook_resid_pre", "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    close(circuit_tracer_clt(tmp_path / "clt"), rebuilt(own))
    assert formats.export(own, tmp_path / "clt", format="circuit_tracer") == written  # replaces nothing
    found = sae_dist.load(tmp_path / "clt", format="circuit_tracer").dictionary
    close(found.reconstruct(ROWS).double(), rebuilt(own))
    same = ("hook", "target_hook", "sites", "target_sites", "cross_layer", "model", "d_model", "d_out")
    assert {key: found.info[key] for key in same} == {key: own.info[key] for key in same}
    dictionary_file.save(found, tmp_path / "ours")
    close(sae_dist.load(tmp_path / "ours").dictionary.reconstruct(ROWS).double(), rebuilt(own))


def test_hook_points_of_a_cross_layer_transcoder_that_have_no_name_here_are_told(tmp_path):
    own = cross_layer("jumprelu")
    formats.export(own, tmp_path, format="circuit_tracer", hook_name="hook_resid_mid", hook_name_out="hook_mlp_out")
    with pytest.raises(UserError, match="tell it: hook=..."):
        sae_dist.load(tmp_path, format="circuit_tracer")
    with pytest.raises(UserError, match="hook=resid_pre.1 is of one layer, and .* has 3; write L for its number"):
        sae_dist.load(tmp_path, format="circuit_tracer", hook="resid_pre.1")
    found = sae_dist.load(tmp_path, format="circuit_tracer", hook="model.layers.L.norm").dictionary
    assert found.info["hook"] == "model.layers.0.norm+model.layers.1.norm+model.layers.2.norm"
    close(found.reconstruct(ROWS).double(), rebuilt(own))


def test_cross_layer_transcoders_that_circuit_tracer_does_not_know_are_not_written(tmp_path):
    own = cross_layer("jumprelu")
    later = [{"hook": f"resid_pre.{layer}", "width": WIDTH} for layer in (1, 2, 3)]
    apart = own.info | {"sites": later, "hook": "+".join(site["hook"] for site in later)}
    skip = dataclasses.replace(own, W_skip=torch.zeros(D, D))
    for each, said in (
        (cross_layer("topk"), "without latents that are chosen as topk does"), (skip, "without a skip connection"),
        (cross_layer("jumprelu", n=40), "not 40 of 3"),
        (dataclasses.replace(own, info=apart), "of every layer from 0 on, not resid_pre.1[+]resid_pre.2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            formats.export(each, tmp_path / "to", format="circuit_tracer")
    with pytest.raises(UserError, match="over several hook points .*; use circuit_tracer"):
        formats.export(own, tmp_path / "to", format="saelens")
    assert not (tmp_path / "to").exists()


def test_another_file_is_not_replaced_and_names_may_be_given(tmp_path):
    formats.export(dictionary("topk"), tmp_path, format="saelens", model_name="gpt2-small", hook_name="blocks.3.hook")
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("gpt2-small", "blocks.3.hook")
    with pytest.raises(UserError, match="another sae_weights.safetensors already"):
        formats.export(dictionary("jumprelu"), tmp_path, format="saelens")


@pytest.mark.parametrize(
    ("format", "file", "variant"),
    [("saelens", "cfg.json", "jumprelu"), ("dictionary_learning", "config.json", "topk"),
     ("circuit_tracer", "config.yaml", "jumprelu")],
)  # fmt: skip
def test_a_model_that_is_a_folder_is_called_by_its_last_part(tmp_path, format, file, variant):
    own = dictionary(variant, transcodes=format == "circuit_tracer")
    local = dataclasses.replace(own, info=own.info | {"model": "/home/alice/acme-ft"})
    formats.export(local, tmp_path, format=format)
    said = (tmp_path / file).read_text()
    assert "acme-ft" in said and "alice" not in said
    assert sae_dist.load(tmp_path, format=format).model == "acme-ft"


def published(seed: int = 5) -> dict[str, Tensor]:
    """Weights of a dictionary as its publisher has them: decoder rows of any norm."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()} | {
        "threshold": torch.rand(N, generator=g) * 3
    }


def jumprelu(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """JumpReLU(x W_enc + b_enc) W_dec + b_dec, as both Gemma Scope reports define it."""
    z = x @ own["W_enc"].double() + own["b_enc"]
    return (z * (z > own["threshold"])) @ own["W_dec"].double() + own["b_dec"]


@pytest.mark.parametrize("case", ["W_enc", "w_enc", "embedding"])
def test_gemma_scope_is_read(tmp_path, case):
    own = published()
    folder = tmp_path / ("embedding" if case == "embedding" else "layer_3") / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    lower = {name.lower() if case == "w_enc" else name: tensor.numpy() for name, tensor in own.items()}
    np.savez(folder / "params.npz", **lower)
    hook = "resid_pre.0" if case == "embedding" else "resid_post.3"
    found = sae_dist.load(folder, format="gemma_scope", hook=hook, model="google/gemma-2-2b")
    expected = jumprelu(X, own)
    if case == "embedding":  # which reads and writes embeddings before they are multiplied by sqrt(d)
        root = D**0.5
        expected = jumprelu(X / root, own | {"b_dec": own["b_dec"] / root}) * root
    close(found(ROWS).double(), expected)
    assert (found.k, found.info["variant"]) == (71, "jumprelu")
    if case == "W_enc":
        with pytest.raises(UserError, match="path says layer 3"):
            sae_dist.load(folder, format="gemma_scope", hook="resid_post.4", model="m")


@pytest.mark.parametrize("said", [True, False])
def test_gemma_scope_2_is_read(tmp_path, said):
    own = published()
    save_file({name.lower(): tensor for name, tensor in own.items()}, tmp_path / "params.safetensors")
    told = {"hook": "resid_post.3", "model": "gemma-v3-270m"}
    if said:
        block = "model.layers.3.output"
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", "affine_connection": False,
                  "hf_hook_point_in": block, "hf_hook_point_out": block}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        told = {}
    found = sae_dist.load(tmp_path, format="gemma_scope_2", **told)
    close(found(ROWS).double(), jumprelu(X, own))
    assert (found.hook, found.model, found.k) == ("resid_post.3", "gemma-v3-270m", None)


def test_a_transcoder_of_gemma_scope_2_is_read(tmp_path):
    own, affine = published(), torch.randn(D, D, generator=torch.Generator().manual_seed(2))
    stored = {name.lower(): tensor for name, tensor in own.items()} | {"affine_skip_connection": affine}
    save_file(stored, tmp_path / "params.safetensors")
    norm = "model.layers.3.{}_feedforward_layernorm.output"
    config = {"architecture": "jump_relu", "model_name": "gemma", "hf_hook_point_in": norm.format("pre"),
              "hf_hook_point_out": norm.format("post")}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = sae_dist.load(tmp_path, format="gemma_scope_2")
    close(found(ROWS).double(), jumprelu(X, own) + X @ affine.double())
    assert found.hook == norm.format("pre").removesuffix(".output")
    assert found.target_hook == norm.format("post").removesuffix(".output")


def llama_scope_files(folder: Path, **changed) -> dict[str, Tensor]:
    own = published()
    (folder / "checkpoints").mkdir(parents=True)
    linear = {"encoder.weight": own["W_enc"].T, "encoder.bias": own["b_enc"], "decoder.weight": own["W_dec"].T,
              "decoder.bias": own["b_dec"]}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in linear.items()}, folder / "checkpoints/final.safetensors")
    config = {"d_model": D, "d_sae": N, "jump_relu_threshold": 0.75, "act_fn": "jumprelu", "top_k": 50,
              "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
              "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
              "dataset_average_activation_norm": {"in": 11.0, "out": 11.0}, "use_decoder_bias": True}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config | changed))
    return own


@pytest.mark.parametrize("units", ["raw", "scaled"])
def test_llama_scope_is_read(tmp_path, units):
    own = llama_scope_files(tmp_path)
    s, norm = D**0.5 / 11.0, own["W_dec"].double().norm(dim=1)
    z = s * X @ own["W_enc"].double() + own["b_enc"]
    compared = z * norm / (s if units == "raw" else 1)  # by the norms of decoder columns, in either units
    f = z * (compared > 0.75)
    expected = (f @ own["W_dec"].double() + own["b_dec"]) / s
    found = sae_dist.load(tmp_path, format="llama_scope", threshold_units=units, model="meta-llama/Llama-3.1-8B")
    close(found(ROWS).double(), expected)
    assert found.hook == "resid_post.3"


def test_qwen_scope_is_read(tmp_path):
    own, folder = published(), tmp_path / "SAE-Res-Qwen3-8B-W64K-L0_5"
    folder.mkdir()
    stored = {"W_enc": own["W_enc"].T.contiguous(), "W_dec": own["W_dec"].T.contiguous(), "b_enc": own["b_enc"],
              "b_dec": own["b_dec"]}  # fmt: skip
    torch.save(stored, folder / "layer7.sae.pt")
    found = sae_dist.load(folder / "layer7.sae.pt", format="qwen_scope", model="Qwen/Qwen3-8B")
    z = X @ stored["W_enc"].double().T + stored["b_enc"]
    values, places = z.topk(5)
    expected = torch.zeros_like(z).scatter(-1, places, values) @ stored["W_dec"].double().T + stored["b_dec"]
    close(found(ROWS).double(), expected)
    assert (found.hook, found.k) == ("resid_post.7", 5)


def test_saelens_files_of_its_other_settings_are_read(tmp_path):
    own = published()
    r_mag, b_gate, b_mag = torch.randn(3, N, generator=torch.Generator().manual_seed(1)).double()
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    plain = {name: own[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    cfg = {"d_in": D, "d_sae": N, "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": metadata}

    def load(weights: dict[str, Tensor], **keys):
        told = keys.pop("told", {})
        save_file(
            {name: tensor.float().contiguous() for name, tensor in weights.items()},
            tmp_path / "sae_weights.safetensors",
        )
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | keys))
        return sae_dist.load(tmp_path, format="saelens", **told)(ROWS).double()

    W_enc, W_dec, b_dec = (own[name].double() for name in ("W_enc", "W_dec", "b_dec"))
    z, norm = (X - b_dec) @ W_enc + own["b_enc"], W_dec.norm(dim=1)
    found = load(plain, architecture="topk", k=5, rescale_acts_by_decoder_norm=True)
    close(found, largest(z * norm, 5) @ (W_dec / norm[:, None]) + b_dec)
    u = (X - b_dec) @ W_enc
    gated = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, "r_mag": r_mag, "b_gate": b_gate, "b_mag": b_mag}
    f = (u + b_gate > 0) * (u * r_mag.exp() + b_mag).relu()
    close(load(gated, architecture="gated"), f @ W_dec + b_dec)
    scaled = ((0.3 * X) @ W_enc + own["b_enc"]).relu() @ W_dec + b_dec
    keys = {"architecture": "standard", "apply_b_dec_to_input": False}
    found = load(plain, **keys, normalize_activations="expected_average_only_in", told={"scale": 0.3})
    close(found, scaled / 0.3)


def test_dictionary_learning_files_of_its_other_classes_are_read(tmp_path):
    own = published()
    W_enc, W_dec, b_enc, b_dec = (own[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    linear = {"encoder.weight": own["W_enc"].T, "encoder.bias": own["b_enc"], "decoder.weight": own["W_dec"].T}

    def load(kind: str, weights: dict[str, Tensor], **keys) -> Tensor:
        trainer = {"dict_class": kind, "lm_name": "gpt2", "submodule_name": "resid_post_layer_3", **keys}
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
        torch.save(weights, tmp_path / "ae.pt")
        found = sae_dist.load(tmp_path, format="dictionary_learning")
        assert found.hook == "resid_post.3"
        return found(ROWS).double()

    z = (X - b_dec) @ W_enc + b_enc
    counts = {"b_dec": own["b_dec"], "k": torch.tensor(5), "threshold": torch.tensor(2.0)}
    at_inference = (z.relu() * (z.relu() > 2.0)) @ W_dec + b_dec
    close(load("BatchTopKSAE", linear | counts, k=5), at_inference)
    nested = {name: own[name] for name in ("W_enc", "W_dec", "b_enc")} | counts | {"group_sizes": torch.tensor([8, 32])}
    close(load("MatryoshkaBatchTopKSAE", nested, k=5), at_inference)
    new = load("AutoEncoderNew", linear | {"decoder.bias": own["b_dec"]})
    close(new, (X @ W_enc + b_enc).relu() @ W_dec + b_dec)
    r_mag, gate, mag = torch.randn(3, N, generator=torch.Generator().manual_seed(1)).double()
    u = (X - b_dec) @ W_enc
    gated = {"encoder.weight": own["W_enc"].T, "decoder.weight": own["W_dec"].T, "decoder_bias": own["b_dec"],
             "r_mag": r_mag.float(), "gate_bias": gate.float(), "mag_bias": mag.float()}  # fmt: skip
    f = (u + gate > 0) * (r_mag.exp() * u + mag).relu()
    close(load("GatedAutoEncoder", gated), f @ W_dec + b_dec)
