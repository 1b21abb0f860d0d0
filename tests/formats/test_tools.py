"""What other tools make of our files, and we of theirs: each in an environment of its own, made from the package index.

The environments are kept in the cache folder: the first time takes a few minutes.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sae_dist
from sae_dist import formats
from sae_dist.cache_folder import cache_folder
from tests.formats.dictionaries import ROWS, cross_layer, dictionary, rebuilt

pytestmark = pytest.mark.slow
CHILD = Path(__file__).with_name("tool_child.py")
TOOLS = {
    "saelens": ["sae-lens==6.54.12", "transformer-lens<4"],
    "sparsify": ["eai-sparsify==1.3.3"],
    "dictionary_learning": ["dictionary-learning==0.1.0"],
    "circuit_tracer": ["circuit-tracer==0.5.0"],
    "saebench": ["sae-bench==0.6.0", "transformer-lens<4"],
    "saedashboard": ["--no-deps", "sae-dashboard==0.8.0", "numpy"],  # its classes of files; the rest is not run
}
EXPORTED = {
    "saelens": [*(((v, "")) for v in ("topk", "abs_topk", "batchtopk", "jumprelu", "gated", "matryoshka", "relu",
                                         "relu_norm", "jumprelu_tanh")),
                ("jumprelu", "transcoder"), ("relu", "transcoder"), ("jumprelu", "skip"), ("relu", "skip")],
    "sparsify": [("topk", ""), ("topk", "transcoder"), ("topk", "skip")],
    "dictionary_learning": [(v, "") for v in ("topk", "batchtopk", "jumprelu", "gated", "matryoshka", "relu")],
    "circuit_tracer": [*((v, "transcoder") for v in ("topk", "batchtopk", "jumprelu", "relu")), ("jumprelu", "skip"),
                       ("jumprelu", "cross_layer"), ("relu", "cross_layer")],
}  # fmt: skip
TOLD = {  # of the tool's own files: what they do not say
    "layers.3": {"model": "gpt2"},
    "transcoder": {"model": "gpt2", "hook": "resid_pre.3", "target_hook": "mlp_out.3"},
}


def environment(tool: str) -> Path:
    """The Python of an environment with the tool and a torch for CPUs, where the machine has one."""
    folder = cache_folder() / "tools" / tool
    uv, here = shutil.which("uv", path=Path(sys.executable).parent), torch.__version__
    if uv is None:
        pytest.skip("uv, which makes the environments, is not installed")
    if not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "torch.txt").write_text(f"torch=={here}\n")
        links = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
        ).stdout.split()
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder / "venv"], check=True)
        where = [word for link in links for word in ("--find-links", link)]
        subprocess.run(
            [uv, "pip", "install", "-q", "--python", folder / "venv/bin/python", *where, "-c", folder / "torch.txt",
             *TOOLS[tool]], check=True, timeout=1800,
        )  # fmt: skip
        # torchvision's wheel on the index is for a torch with CUDA, and does not load beside one for CPUs.
        python = folder / "venv/bin/python"
        subprocess.run([uv, "pip", "uninstall", "-q", "--python", python, "torchvision"], check=True)
        (folder / "ready").touch()
    return folder / "venv/bin/python"


def ran(tool: str, *line: object) -> str:
    """What a program says that runs in the tool's environment, without ours."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}  # and keeps bytecode
    done = subprocess.run([environment(tool), *map(str, line)], env=own, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all())


@pytest.mark.parametrize("tool", EXPORTED)
def test_the_tool_rebuilds_what_we_do_and_we_what_it_does(tmp_path, tool):
    np.save(tmp_path / "rows.npy", ROWS.numpy())
    exported = {}
    for variant, reads in EXPORTED[tool]:
        folder, transcodes = tmp_path / f"{variant}{reads}", bool(reads)
        own = (
            cross_layer(variant)
            if reads == "cross_layer"
            else dictionary(variant, transcodes=transcodes, skip=reads == "skip")
        )
        formats.export(own, folder, format=tool)
        exported[folder] = rebuilt(own)
    said = ran(tool, CHILD, tool, tmp_path / "rows.npy", *exported)
    wrong = [path.name for path, y in exported.items() if not close(torch.from_numpy(np.load(path / "rebuilt.npy")), y)]
    assert not wrong
    fresh = [Path(line) for line in said.splitlines() if line.startswith(str(tmp_path))]
    assert fresh
    for path in fresh:
        theirs = torch.from_numpy(np.load(path / "rebuilt.npy"))
        (path / "rebuilt.npy").unlink()
        assert close(sae_dist.load(path, format=tool, **TOLD.get(path.name, {}))(ROWS), theirs), path.name


def test_saebench_evaluates_an_export_and_finds_our_figures(tmp_path):
    exported = {tmp_path / variant: dictionary(variant) for variant in ("topk", "batchtopk", "jumprelu", "relu")}
    for folder, own in exported.items():
        formats.export(own, folder, format="saelens")
    ran("saebench", CHILD.with_name("saebench_child.py"), *exported)
    for folder, own in exported.items():
        found, x = json.loads((folder / "core.json").read_text()), torch.from_numpy(np.load(folder / "x.npy"))
        active, error = own.encode(x), (rebuilt(own, x) - x).square().sum(1)
        assert found["hook"] == "blocks.3.hook_resid_post" and len(x) == 64
        assert found["sparsity"]["l0"] == pytest.approx(len(active.values) / len(x), abs=1e-6)
        assert found["reconstruction_quality"]["mse"] == pytest.approx(float(error.mean()) / len(x), rel=1e-4)
        density = active.indices.bincount(minlength=own.n_latents) / len(x)
        torch.testing.assert_close(torch.tensor(found["density"]), density)
        for kind, name in (("model_performance_preservation", "ce_loss_score"), ("shrinkage", "l2_ratio")):
            assert math.isfinite(found[kind][name])
