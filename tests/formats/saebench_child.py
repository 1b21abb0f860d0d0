"""Runs in the environment of SAEBench: `python saebench_child.py FOLDER...`, without ours.

Its core evaluation of each exported dictionary, on a random transformer. Writes its figures as core.json and the
activations that they are of as x.npy beside the files.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig

D, CONTEXT, VOCAB = 12, 16, 50
ALL = {f"compute_{name}": True for name in (
    "kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics",
    "featurewise_weight_based_metrics",
)}  # fmt: skip


class Tokens:
    """What the evaluation asks of SAELens' store, which would fetch a data set: the same tokens each time."""

    store_batch_size_prompts, context_size = 4, CONTEXT

    def get_batch_tokens(self, n):
        return torch.randint(0, VOCAB, (n, CONTEXT), generator=torch.Generator().manual_seed(0))

    def reset_input_dataset(self):
        """There is nothing to go back to."""


@torch.no_grad()
def main(*folders):
    torch.manual_seed(0)
    sizes = {"n_layers": 4, "d_model": D, "n_ctx": CONTEXT, "d_head": 3, "n_heads": 4, "d_vocab": VOCAB}
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="relu", device="cpu")).eval()
    config = CoreEvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, **ALL
    )
    for folder in map(Path, folders):
        _, sae, _ = load_and_format_sae("ours", SAE.load_from_disk(folder), "cpu")
        found, by_latent = run_evals(sae, Tokens(), model, config)
        hook = sae.cfg.hook_name
        _, cache = model.run_with_cache(Tokens().get_batch_tokens(4), names_filter=[hook])
        np.save(folder / "x.npy", cache[hook].flatten(0, 1).numpy())
        densities = by_latent["feature_density"]
        (folder / "core.json").write_text(json.dumps(found | {"hook": hook, "density": densities}))


if __name__ == "__main__":
    main(*sys.argv[1:])
