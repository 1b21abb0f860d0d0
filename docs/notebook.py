"""A notebook as a script: what a dictionary does with rows that training never read.

python docs/notebook.py runs/quickstart
"""

# %% A finished run and the store that it was trained on.
import json
import sys
from pathlib import Path

import torch

import sae_dist

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
summary = json.loads((run / "summary.json").read_text())
found = sae_dist.load(run)
rows = sae_dist.Store(summary["store"], hook=found.hook, target_hook=found.target_hook)
print(found)

# %% How much of the variance is not explained, and how many latents are active.
x, target = (each.float() for each in next(rows.heldout(2048)))
f = found.encode(x)
error = (target - found.decode(f)).square().sum()
fvu = error / (target - target.mean(0)).square().sum()
print(f"{len(x)} held-out rows: FVU {fvu:.4f}, L0 {(f > 0).sum(-1).float().mean():.1f}")

# %% The strongest latents of one row, and what the row loses without the first of them.
values, latents = f[0].topk(5)
print("latents of the first row:", dict(zip(latents.tolist(), values.tolist(), strict=True)))
without = f[0].clone()
without[latents[0]] = 0
moved = torch.dist(found.decode(without), found.decode(f[0]))
print(f"without latent {latents[0]} its reconstruction moves by {moved:.3f}")
