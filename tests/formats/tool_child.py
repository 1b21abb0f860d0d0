"""Runs in the environment of another tool: `python tool_child.py TOOL rows.npy FOLDER...`, without ours.

Loads each exported folder with the tool itself and writes what it rebuilds beside it as rebuilt.npy; then makes a file
of the tool's own with its own writer, in FOLDER/fresh-NAME, likewise.
"""

import json
import os
import sys
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import numpy as np
import torch

D, N, K = 12, 40, 5


def saelens(folder, x):
    from sae_lens import SAE

    return SAE.load_from_disk(folder).eval()(x)


def fresh_saelens(root):
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    kinds = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
        "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
        "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {}),
        "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    }
    metadata = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    for name, (sae, config, more) in kinds.items():
        made = sae(config(d_in=D, d_sae=N, metadata=SAEMetadata(**metadata), **more))
        randomise(made)
        if name == "batchtopk":
            made.topk_threshold.fill_(1.5)
        made.save_inference_model(str(root / f"fresh-{name}"))
        yield root / f"fresh-{name}"


def sparsify(folder, x):
    from sparsify import SparseCoder

    return SparseCoder.load_from_disk(folder)(x).sae_out


def fresh_sparsify(root):
    from sparsify import SparseCoder, SparseCoderConfig

    for name, transcode in (("layers.3", False), ("transcoder", True)):
        made = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, transcode=transcode))
        randomise(made)
        made.save_to_disk(root / name)
        yield root / name


def dictionary_learning(folder, x):
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder), "cpu")[0](x)


def fresh_dictionary_learning(root):
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = [AutoEncoder(D, N), AutoEncoderNew(D, N), GatedAutoEncoder(D, N), JumpReluAutoEncoder(D, N),
            BatchTopKSAE(D, N, K), MatryoshkaBatchTopKSAE(D, N, K, [8, 32]), AutoEncoderTopK(D, N, K)]  # fmt: skip
    for each in made:
        kind = type(each).__name__
        randomise(each)
        if kind == "AutoEncoder":
            each.decoder.weight.data /= each.decoder.weight.data.norm(dim=0)  # its reader does that otherwise
        if hasattr(each, "threshold") and each.threshold.ndim == 0:
            each.threshold.fill_(1.5)
        folder = root / f"fresh-{kind}"
        folder.mkdir()
        torch.save(each.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": kind, "k": K, "lm_name": "gpt2", "layer": 3, "submodule_name": "resid_post_layer_3"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        yield folder


def circuit_tracer(folder, x):
    import yaml
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    if (folder / "W_enc_0.safetensors").exists():
        cpu = torch.device("cpu")
        found = load_clt(str(folder), device=cpu, dtype=torch.float32, lazy_decoder=False)
        return torch.cat(list(found(torch.stack(x.chunk(found.n_layers, 1)))), 1)
    from circuit_tracer.transcoder.activation_functions import TopK
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    found = load_relu_transcoder(str(next(folder.glob("layer_*.safetensors"))), 3, device=torch.device("cpu"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if config.get("activation") == "topk":
        found.activation_function = TopK(config["k"])
    return found(x)


def fresh_circuit_tracer(root):
    import yaml
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    cpu, fp32 = torch.device("cpu"), torch.float32
    kinds = {"relu": torch.nn.functional.relu, "jumprelu": JumpReLU(torch.rand(N), 0.1)}
    for name, activation in kinds.items():
        made = SingleLayerTranscoder(D, N, activation, 3, device=cpu, dtype=fp32)
        randomise(made)
        folder = root / f"fresh-{name}"
        folder.mkdir()
        with torch.no_grad():
            made.to_safetensors(str(folder / "layer_3.safetensors"))
        config = {"model_name": "gpt2", "model_kind": "transcoder_set", "feature_input_hook": "hook_resid_pre",
                  "feature_output_hook": "hook_mlp_out", "scan": "x"}  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        yield folder
    made = CrossLayerTranscoder(3, 20, D // 3, "jump_relu", lazy_decoder=False, device=cpu, dtype=fp32)
    randomise(made)
    folder = root / "fresh-cross_layer"
    with torch.no_grad():
        made.to_safetensors(str(folder))
    config["model_kind"] = "cross_layer_transcoder"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    yield folder


@torch.no_grad()
def randomise(module):
    """Numbers of a sane size everywhere, none of them special: a wrong sign or a missing bias would show."""
    g = torch.Generator().manual_seed(4)
    for name, tensor in module.named_parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=g) * (0.3 if tensor.ndim == 1 else 1))
        if "threshold" in name:
            tensor.copy_(tensor.abs())


@torch.no_grad()
def main(tool, rows, *folders):
    x = torch.from_numpy(np.load(rows))
    rebuild = globals()[tool]
    for folder in map(Path, folders):
        np.save(folder / "rebuilt.npy", rebuild(folder, x).numpy())
    for folder in list(globals()[f"fresh_{tool}"](Path(rows).parent)):
        np.save(folder / "rebuilt.npy", rebuild(folder, x).numpy())
        print(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
