"""A notebook as a script: what a dictionary sees in a prompt, and what the model loses with its reconstruction.

python docs/notebook_prompt.py runs/quickstart
"""

# %% A finished run, its language model, and a prompt that begins as the documents of a harvest do.
import sys

import torch

import sae_dist

run = sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"
found, own = sae_dist.load(run), sae_dist.language_model(run)
prompt = own.tokenizer.bos_token + "In the beginning God created the heaven and the earth."
tokens = own.tokenizer(prompt, return_tensors="pt").to(own.device)["input_ids"]

# %% The strongest latents on the prompt, but for its first position, and their pages.
with sae_dist.attach(own.model, found) as attached, torch.no_grad():
    clean = own.model(input_ids=tokens, labels=tokens).loss
active = attached.active
for at in active.values.where(active.rows > 0, 0).topk(5).indices.tolist():
    word, latent = own.tokenizer.decode(tokens[0, active.rows[at]]), int(active.indices[at])
    print(f"latent {latent} is {active.values[at]:.2f} at {word!r}: {run}/pages/latent.html#{latent}")

# %% The loss on the prompt, with the activations as they are and with their reconstruction.
with sae_dist.attach(own.model, found, replace=True), torch.no_grad():
    spliced = own.model(input_ids=tokens, labels=tokens).loss
print(f"loss {clean:.3f}, with the reconstruction {spliced:.3f}")
