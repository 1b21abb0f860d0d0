"""Parameters before step 0."""

import pytest
import torch

from sae_dist.sae.initialize import BLOCK, geometric_median, initialize, random_rows


def test_the_geometric_median_of_a_line_is_its_median():
    x = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [100, 0]])
    assert torch.allclose(geometric_median(x, iterations=2000, tolerance=0), torch.tensor([2.0, 0]), atol=1e-3)


def test_the_geometric_median_has_a_smaller_sum_of_distances_than_its_neighbours_and_the_mean():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).exp()
    y = geometric_median(x)

    def cost(point):
        return (x - point).double().norm(dim=-1).sum()

    for neighbour in [x.mean(0), *(y + 0.05 * sign * step for sign in (-1, 1) for step in torch.eye(6))]:
        assert cost(y) < cost(neighbour)


def test_one_outlier_moves_the_mean_and_not_the_geometric_median():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    x[0] = 1e6
    assert geometric_median(x).norm() < 0.5 < x.mean(0).norm()


def test_initialisation_is_tied_unit_and_of_the_right_size():
    x = 3 + torch.randn(512, 16, generator=torch.Generator().manual_seed(2))
    start = initialize(x, n_latents=64, k=4, seed=0)
    (W_enc, W_dec, b_enc, b_dec), level = start.parameters, start.level
    c = (W_enc.T / W_dec).mean()
    assert torch.allclose(W_enc.T, c * W_dec)
    assert torch.allclose(W_dec.norm(dim=-1), torch.ones(64))
    assert not b_enc.any()
    assert W_enc.T.is_contiguous()
    values, indices = ((x - b_dec) @ W_enc).relu().topk(4)
    rebuilt = torch.einsum("bk,bkd->bd", values, W_dec[indices])
    ratio = rebuilt.norm(dim=-1).mean() / (x - b_dec).norm(dim=-1).mean()
    assert abs(float(ratio) - 1) < 1e-4
    assert level == pytest.approx(float(values[:, -1].mean()), rel=1e-4)


def test_with_a_target_each_side_has_its_own_rows_and_centre():
    g = torch.Generator().manual_seed(2)
    x, target = 3 + torch.randn(512, 16, generator=g), torch.randn(512, 10, generator=g) - 40
    (W_enc, W_dec, b_enc, b_dec), level, b_in = initialize(x, target=target, n_latents=64, k=4, seed=0)
    assert W_enc.shape == (16, 64) and W_dec.shape == (64, 10) and not b_enc.any()
    assert torch.equal(b_dec, geometric_median(target)) and b_in is not None and torch.equal(b_in, geometric_median(x))
    assert torch.allclose(W_dec.norm(dim=-1), torch.ones(64)) and torch.allclose(
        W_enc.norm(dim=0).diff(), torch.zeros(63), atol=1e-5
    )
    values, indices = ((x - b_in) @ W_enc).relu().topk(4)
    rebuilt = torch.einsum("bk,bkd->bd", values, W_dec[indices])
    assert float(rebuilt.norm(dim=-1).mean() / (target - b_dec).norm(dim=-1).mean()) == pytest.approx(1, abs=1e-4)
    assert level == pytest.approx(float(values[:, -1].mean()), rel=1e-4)


def test_the_seed_decides_and_nothing_else():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(11)
    first = initialize(x, n_latents=16, k=2, seed=5).parameters
    torch.manual_seed(12)
    again, other = (initialize(x, n_latents=16, k=2, seed=seed).parameters for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("bounds", [(0, 3), (5, BLOCK + 9), (BLOCK - 1, BLOCK), (BLOCK, 2 * BLOCK), (7, 3 * BLOCK - 1)])
def test_a_part_of_the_decoder_is_that_part_of_the_whole(bounds):
    whole = random_rows("W_dec", range(3 * BLOCK), width=5, seed=1)
    assert torch.equal(random_rows("W_dec", range(*bounds), width=5, seed=1), whole[slice(*bounds)])


def test_no_two_blocks_and_no_two_seeds_share_rows():
    rows = torch.cat([random_rows("W_dec", range(2 * BLOCK), width=4, seed=seed) for seed in (0, 1, -1)])
    assert len(rows.unique(dim=0)) == 6 * BLOCK


def test_parts_made_apart_are_the_whole_dictionary():
    x = 2 + torch.randn(300, 12, generator=torch.Generator().manual_seed(4))
    whole = initialize(x, n_latents=50, k=4, seed=3).parameters
    parts = (range(0, 20), range(20, 48), range(48, 50))  # the last is smaller than k
    seen: dict[str, list[torch.Tensor]] = {"best": [], "rebuilt": []}

    def note(what: str, tensor: torch.Tensor) -> torch.Tensor:
        seen[what].append(tensor)
        return torch.full_like(tensor[:, 0], torch.inf) if what == "best" else tensor

    for part in parts:
        initialize(x, n_latents=50, k=4, seed=3, latents=part, kth=lambda best: note("best", best))
    least = torch.cat(seen["best"], 1).topk(4).values[:, -1]
    for part in parts:
        initialize(x, n_latents=50, k=4, seed=3, latents=part, kth=lambda _: least, total=lambda a: note("rebuilt", a))
    rebuilt = torch.stack(seen["rebuilt"]).sum(0)
    for part in parts:
        W_enc, W_dec, b_enc, b_dec = initialize(
            x, n_latents=50, k=4, seed=3, latents=part, kth=lambda _: least, total=lambda _: rebuilt
        ).parameters
        assert torch.equal(W_enc, whole.W_enc[:, part.start : part.stop])
        assert torch.equal(W_dec, whole.W_dec[part.start : part.stop])
        assert torch.equal(b_dec, whole.b_dec)
        assert b_enc.shape == (len(part),)
