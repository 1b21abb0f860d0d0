"""The batch's best, from candidates of any width, against sorting all pre-activations."""

import pytest
import torch
from sae_kernels import reference
from sae_kernels.reference import Selected

from sae_dist.train.parallel.batch_select import batch_best
from sae_dist.train.parallel.mesh import Mesh

ROWS, N_LATENTS, K = 37, 50, 4


def pre_activations(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(ROWS, N_LATENTS, generator=generator)
    match kind:
        case "spread":
            return z
        case "one row":  # has all that is positive but a little
            z[5] += 20
            z[6, :7] += 10
        case "ties":  # five values: the cut goes through a tie of rows and latents
            return (2 * z).round().clamp(-2, 2)
        case "equal":  # everything ties
            return torch.ones_like(z)
        case "few":
            return z - 2
        case "none":
            return -z.abs()
        case "not a number":
            z[::3, ::2] = torch.nan
        case "infinite":
            z[::5, ::7] = torch.inf
    return z


@pytest.mark.parametrize("width", [1, 3, 16, 50, 1000])
@pytest.mark.parametrize("at_once", [None, 7])
@pytest.mark.parametrize("kind", ["spread", "one row", "ties", "equal", "few", "none", "not a number", "infinite"])
def test_the_batchs_best_are_those_of_the_reference(kind, width, at_once):
    z, widths = pre_activations(kind), []

    def select(rows: torch.Tensor, k: int) -> Selected:
        widths.append((len(rows), k))
        return reference.topk(z[rows[:, 0].long()], k)

    rows = torch.arange(ROWS)[:, None].float()
    found = batch_best(
        Mesh.single(), select, rows, first_row=0, batch=ROWS, latents=range(N_LATENTS), n_latents=N_LATENTS,
        k=K, counted=True, width=width, at_once=at_once,
    )  # fmt: skip
    expected = reference.batch_topk(z, K)
    assert torch.equal(found.row, torch.arange(ROWS).repeat_interleave(expected.offsets.diff()))
    assert torch.equal(found.latent, expected.indices)
    assert torch.equal(found.values, expected.values)
    assert found.smallest == (float(expected.values.min()) if len(expected.values) else None)
    assert found.widened == sum(n for n, k in widths if k > min(width, N_LATENTS))
    for k in {k for _, k in widths}:  # of one pass: never more than twice what is chosen, once rows are widened
        assert sum(n for n, width in widths if width == k) * k <= max(ROWS * min(width, k), 2 * ROWS * K)
    if kind == "one row" and width == 3:
        assert sorted({k for n, k in widths if n == 1 and k > 12}) == [24, 48, 50]
