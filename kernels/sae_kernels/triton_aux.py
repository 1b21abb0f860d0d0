"""AuxK over few dead latents as dense bf16 products over the compacted set.

Gathering k_aux rows a token moves 4 k_aux d_model bytes; multiplying by all n_dead rows costs 2 n_dead d_model
operations, which a matrix unit does in less time while n_dead is below some hundreds of k_aux. So e_hat = A W, its
gradients and the encoder's are products of A [rows, n_dead], the dead activations, with a bounded number of rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels.reference import Selected

DENSE = 64  # dead latents for each of k_aux up to which the products are taken; above it rows are gathered
ALIGNED = 64  # dead latents are padded to a multiple: libraries multiply odd sizes at a quarter of the speed
ELEMENTS = 1 << 26  # of A at once: 128 MiB


class DeadGradients(NamedTuple):
    """Gradients of the dead latents alone; `slots` [n_latents] is a latent's row in them, -1 where it has none."""

    slots: Tensor
    enc: Tensor  # [n_dead, d_model]
    dec: Tensor
    bias: Tensor  # [n_dead]
    squared_error: Tensor


def dense_aux(
    rows: Tensor, error: Tensor, W_dec: Tensor, places: Tensor, selected: Selected, *, scale: float
) -> DeadGradients:
    """AuxK's gradients and error: d loss / d e_hat = scale (e - e_hat); `selected` counts within the dead, `places`.

    Operands are bf16, sums of a product fp32, sums over blocks of rows fp32: 2^-8 of the largest gradient.
    """
    n_dead, d_model = len(places), rows.shape[1]
    width = -(-n_dead // ALIGNED) * ALIGNED
    W = torch.zeros(width, d_model, dtype=torch.bfloat16, device=rows.device)
    W[:n_dead] = W_dec[places]
    enc, dec = (torch.zeros(width, d_model, device=rows.device) for _ in range(2))
    bias, squared_error = torch.zeros(width, device=rows.device), torch.zeros((), device=rows.device)
    block = max(1, ELEMENTS // width)
    for first in range(0, len(rows), block):
        part = slice(first, first + block)
        A = torch.zeros(len(rows[part]), width, dtype=torch.bfloat16, device=rows.device)
        A.scatter_add_(1, selected.indices[part].clamp_min(0), selected.values[part].bfloat16())  # empty places add 0
        remaining = error[part] - (A @ W).float()
        squared_error += remaining.square().sum()
        g = (scale * remaining).bfloat16()
        d_z = (g @ W.T).mul_(A > 0)
        dec += (A.T @ g).float()
        enc += (d_z.T @ rows[part]).float()
        bias += d_z.float().sum(0)
    slots = torch.full((len(W_dec),), -1, dtype=torch.int32, device=rows.device)
    slots[places] = torch.arange(n_dead, dtype=torch.int32, device=rows.device)
    return DeadGradients(slots, enc[:n_dead], dec[:n_dead], bias[:n_dead], squared_error)
