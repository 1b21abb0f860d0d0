"""Real activations for the benchmarks: SmolLM2's residual stream after layer 15 on the built-in text, shuffled.

Rows of attention sinks (norm above ten times the median; the first position of a document) are dropped, as is usual,
and the rest scaled to a median norm of sqrt(d_model). Made once into the cache folder.
"""

from pathlib import Path

import numpy as np
import torch

HOOK, CONTEXT, ROWS = "resid_post.15", 256, 2**18


def load(folder: Path, rows: int = ROWS) -> Path:
    """The activations as an .npy of float16 [rows, 576], from the cache folder or from the model (minutes)."""
    path = folder / f"smollm2-{HOOK}-{rows}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        x = _capture(rows)
        norms = x.norm(dim=1)
        x = x[norms < 10 * norms.median()] * (x.shape[1] ** 0.5 / norms.median())
        np.save(path, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].half().numpy())
    return path


def _capture(rows: int) -> torch.Tensor:
    from sae_dist.model import hooks
    from sae_dist.model.config import ModelConfig
    from sae_dist.model.load import load as load_model
    from sae_dist.text import builtin

    model = load_model(ModelConfig(name="smollm2"))
    ids: list[int] = []
    for document in builtin.documents(builtin.BuiltinText()):
        ids += model.tokenizer(document.text)["input_ids"]
        if len(ids) >= rows:
            break
    tokens = torch.tensor(ids[: rows // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    with torch.no_grad():
        captured = (hooks.capture(model.model, part, [HOOK])[HOOK] for part in tokens.split(16))
        return torch.cat([part.flatten(0, 1).float() for part in captured])
