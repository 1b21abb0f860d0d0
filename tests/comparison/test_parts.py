"""Correlation, matching, splitting, stitching and co-activation against dense algebra and answers worked by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_kernels import Active

from sae_dist.comparison import coactivation, matching
from sae_dist.comparison.activations import PART_ROWS, Activations, Writer
from sae_dist.comparison.correlation import NONE, correlation, pair_sums
from sae_dist.comparison.figures import distribution, mutual, quantiles
from sae_dist.comparison.matching import Nearest, Side, by_chance, match
from sae_dist.comparison.splitting import KINDS, split
from sae_dist.comparison.stitching import Stitch, choose
from sae_dist.comparison.virtual_weights import Stream, feeds
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

ROWS, N, M, D = PART_ROWS + 5000, 9, 7, 12  # more than a part
CONSTANT, SILENT = 5, 6  # latents of the second matrix


def active_of(dense: torch.Tensor) -> Active:
    """Those of each row in a mixed order."""
    rows, latents = dense.flip(1).nonzero().T
    latents = dense.shape[1] - 1 - latents
    counts = rows.bincount(minlength=len(dense))
    return Active(dense[rows, latents], latents, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def written(dense: torch.Tensor, folder: Path) -> Activations:
    writer = Writer(folder, dense.shape[1])
    for rows in dense.split(7001):
        writer.add(active_of(rows))
    return writer.close()


def sparse(seed: int, rows: int, n: int, density: float = 0.1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, n, generator=g) * (torch.rand(rows, n, generator=g) < density)


@pytest.fixture(scope="module")
def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of two dictionaries that share something."""
    a, b = sparse(0, ROWS, N), sparse(1, ROWS, M)
    b[:, 0] += 0.5 * a[:, 3]
    b[:, CONSTANT], b[:, SILENT] = 0.7, 0.0
    a[:, 8] = a[:, 8] * (torch.arange(ROWS) < 40)  # rare, and in the first part alone
    return a, b


@pytest.fixture(scope="module")
def stored(matrices, tmp_path_factory) -> tuple[Activations, Activations]:
    folder = tmp_path_factory.mktemp("activations")
    return written(matrices[0], folder / "a"), written(matrices[1], folder / "b")


def test_activations_are_those_that_went_in_by_row_and_by_latent(matrices, stored):
    for dense, own in zip(matrices, stored, strict=True):
        assert (own.rows, len(own.parts)) == (ROWS, 2)
        assert torch.equal(own.firings, (dense != 0).sum(0))
        back = own.of_rows(65_000, 66_000)
        again = torch.zeros(1000, own.n_latents)
        again[back.rows, back.indices] = back.values
        assert torch.equal(again, dense[65_000:66_000])


@pytest.mark.parametrize("dense_from", [0, 2], ids=["dense", "pairs"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_correlations_are_those_of_numpy(matrices, stored, shuffled, dense_from, monkeypatch):
    monkeypatch.setattr("sae_dist.comparison.correlation.DENSE", dense_from)
    monkeypatch.setattr("sae_dist.comparison.correlation.CELLS", 1000 * M)  # many blocks of rows, the last not full
    order = np.random.default_rng(0).permutation(ROWS) if shuffled else None
    a, b = (matrix.double().numpy() for matrix in matrices)
    b = b if order is None else b[order]
    varies = [at for at in range(M) if at not in (CONSTANT, SILENT)]
    expected = np.corrcoef(a, b[:, varies], rowvar=False)[:N, N:]
    one, other = stored
    found = torch.cat([correlation(one, other, latents, order) for latents in (range(4), range(4, N))])
    np.testing.assert_allclose(found[:, varies].numpy(), expected, atol=1e-9)
    assert (found[:, [CONSTANT, SILENT]] == NONE).all()
    both = pair_sums(one, other, range(N), order, count=True)
    np.testing.assert_array_equal(both.numpy(), (a != 0).T.astype(float) @ (b != 0))


def test_a_permuted_copy_has_each_latent_at_its_image_and_nothing_novel(tmp_path):
    dense, order = sparse(2, 3000, 20), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    W_dec = torch.randn(20, D, generator=torch.Generator().manual_seed(4))
    a = Side(written(dense, tmp_path / "a"), W_dec)
    b = Side(written(dense[:, order], tmp_path / "b"), 2 * W_dec[order])
    found, chance = match(a, b), by_chance(a, b, seed=0)
    for measure in ("correlation", "cosine"):
        assert torch.equal(order[found.first[measure].latent[:, 0]], torch.arange(20))
        assert torch.equal(found.second[measure].latent[:, 0], order)
        for own in (found.first[measure], found.second[measure]):
            torch.testing.assert_close(own.value[:, 0], torch.ones(20))
            torch.testing.assert_close(own.others[:, 0, 0], torch.ones(20))  # the other measure
            assert (own.value[:, 1] < 0.95).all()
        assert mutual(found.first[measure], found.second[measure]).all()
    assert found.first["cosine"].value[:, 1].mean() > 0.3 and chance.first["cosine"].best.mean() < 0.8
    assert (found.first["correlation"].value[:, 1] < 0.1).all()
    assert (chance.first["correlation"].best < 0.1).all() and (chance.second["correlation"].best < 0.1).all()
    splits = split(found.first["cosine"], found.second["cosine"], level=0.9, fires=a.activations.fires)
    assert splits.counts() == dict.fromkeys(KINDS, 0) | {"one_to_one": 20}
    assert torch.equal(splits.parent, order)


@pytest.mark.parametrize("dense_from", [0, 2], ids=["dense", "pairs"])
def test_blocks_of_latents_change_nothing(matrices, stored, dense_from, monkeypatch):
    monkeypatch.setattr("sae_dist.comparison.correlation.DENSE", dense_from)
    whole = match(Side(stored[0], None), Side(stored[1], None))
    if dense_from:
        monkeypatch.setattr("sae_dist.comparison.correlation.CELLS", 2 * M)
        monkeypatch.setattr("sae_dist.comparison.correlation.PAIRS", 50)
    parts = match(Side(stored[0], None), Side(stored[1], None))
    for one, other in zip(
        (*whole.first.values(), *whole.second.values()), (*parts.first.values(), *parts.second.values()), strict=True
    ):
        assert torch.equal(one.latent, other.latent) and torch.equal(one.value, other.value)
    assert whole.first["correlation"].latent[3, 0] == 0  # what was planted


def nearest(latent: list[int], value: Sequence[float]) -> Nearest:
    found = Nearest(len(latent))
    found.latent[:, 0], found.value[:, 0] = torch.tensor(latent), torch.tensor(value)
    return found


def test_splits_by_hand():
    #           0 splits into 1 and 2; 1 has 0; 2 is near 1, which is nearer to 0; 3 is like nothing; 4 is silent
    of_smaller = nearest([1, 0, 1, 3, -1], [0.9, 0.8, 0.7, 0.2, NONE])
    of_larger = nearest([1, 0, 0, 3, -1], [0.8, 0.9, 0.95, 0.2, NONE])  # 3 is novel, 4 is silent
    found = split(of_smaller, of_larger, level=0.7, fires=torch.tensor([1, 1, 1, 1, 0]).bool())
    assert [KINDS[kind] for kind in found.kind] == ["split", "one_to_one", "shared", "unmatched", "never_fires"]
    assert found.parent.tolist() == [1, 0, 0, -1, -1]
    assert [found.children(latent) for latent in range(5)] == [[2, 1], [0], [], [], []]
    chosen = choose(found, torch.tensor([1, 1, 1, 1, 0]).bool(), seed=0)
    assert [mask.nonzero().flatten().tolist() for mask in chosen[:3]] == [[3], [0, 1, 2], [0, 1]]
    assert int(chosen.chance_added.sum()) == 1 and int(chosen.chance_swapped.sum()) == 3
    assert not (chosen.chance_added | chosen.chance_swapped)[4]


def dictionary(seed: int, n: int) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    parameters = Parameters(
        torch.randn(D, n, generator=g), torch.randn(n, D, generator=g) / 3, torch.zeros(n),
        torch.randn(D, generator=g) / 10,
    )  # fmt: skip
    return Dictionary(parameters=parameters, k=3, info={"variant": "topk"})


def test_stitched_reconstructions_are_those_of_dense_algebra():
    small, large = dictionary(0, 5), dictionary(1, 8)
    of_smaller, of_larger = (
        nearest([1, 0, 0, 2, 2], [0.9, 0.9, 0, 0, 0]),
        nearest([1, 0, 0] + [4] * 5, [0.8] * 3 + [0] * 5),
    )
    splits = split(of_smaller, of_larger, level=0.7, fires=torch.ones(5).bool())
    chosen = choose(splits, torch.ones(8).bool(), seed=0)
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(2))
    stitch = Stitch(small, large, chosen, (D,))
    for rows in x.split(170):
        active = small.encode(rows), large.encode(rows)
        stitch.add(rows, active, (small.decode(active[0]), large.decode(active[1])))
    f, g = (dense(each.encode(x), each.n_latents) for each in (small, large))
    (_, V, _, b), (_, W, _, c) = small.parameters, large.parameters
    known, novel, kept = g[:, :3] @ W[:3], g[:, 3:] @ W[3:], f[:, 2:] @ V[2:] + b  # 0 and 1 of the smaller are parents
    added, swapped = chosen.chance_added, chosen.chance_swapped
    stages = {
        "smaller": (f @ V + b, (f > 0).sum()), "larger": (g @ W + c, (g > 0).sum()),
        "novel_added": (f @ V + b + novel, (f > 0).sum() + (g[:, 3:] > 0).sum()),
        "swapped": (kept + known, (f[:, 2:] > 0).sum() + (g[:, :3] > 0).sum()),
        "stitched": (kept + known + novel, (f[:, 2:] > 0).sum() + (g > 0).sum()),
        "chance_added": (f @ V + b + g[:, added] @ W[added], (f > 0).sum() + (g[:, added] > 0).sum()),
        "chance_swapped": (kept + g[:, swapped] @ W[swapped], (f[:, 2:] > 0).sum() + (g[:, swapped] > 0).sum()),
    }  # fmt: skip
    found = stitch.figures()
    assert isinstance(found, dict) and set(found["stages"]) == set(stages)
    for name, (x_hat, active) in stages.items():
        assert found["stages"][name]["fvu"] == pytest.approx(fvu(x, x_hat), rel=1e-4), name
        assert found["stages"][name]["l0"] == pytest.approx(float(active) / len(x))
    alone = [fvu(x, f @ V + b + g[:, [at]] @ W[[at]]) - fvu(x, f @ V + b) for at in range(8)]
    np.testing.assert_allclose(stitch.alone().numpy(), alone, atol=1e-5)
    assert found["improve_alone"]["novel"] == pytest.approx(np.mean(np.array(alone[3:]) < 0))
    assert found["latents"] == {"novel": 5, "known": 3, "parents": 2, "chance_added": 5, "chance_swapped": 3}


def dense(active: Active, n: int) -> torch.Tensor:
    out = torch.zeros(len(active.offsets) - 1, n)
    out[active.rows, active.indices] = active.values
    return out


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float((x - x_hat).double().square().sum() / (x - x.mean(0)).double().square().sum())


def test_latents_that_fire_together_are_partners(tmp_path):
    acts = sparse(5, 4000, 12, density=0.05)
    acts[:, 7] = 2 * acts[:, 2] * (torch.arange(4000) % 4 > 0)  # three in four times with latent 2, and never alone
    own, W_dec = written(acts, tmp_path / "own"), torch.eye(12)
    found = coactivation.partners(own, W_dec, kept=3)
    assert found.latent[2, 0] == 7 and found.latent[7, 0] == 2
    both = (acts[:, 2] > 0) & (acts[:, 7] > 0)
    expected = both.sum() / ((acts[:, 2] > 0) | (acts[:, 7] > 0)).sum()
    assert found.others[2, 0].tolist() == pytest.approx([float(expected), 0])
    assert found.best[2] == pytest.approx(np.corrcoef(acts[:, 2], acts[:, 7])[0, 1], abs=1e-6)
    others = [at for at in range(12) if at not in (2, 7)]
    assert (found.best[others] < 0.2).all() and (coactivation.by_chance(own, W_dec, seed=0).best < 0.2).all()
    assert not (found.latent == torch.arange(12)[:, None]).any()  # none is its own partner


def test_virtual_weights_and_what_they_supply_are_those_of_dense_algebra(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_dist.comparison.correlation.CELLS", 15)  # three latents at a time
    monkeypatch.setattr("sae_dist.comparison.virtual_weights.PAIRS", 100)
    earlier, later = dictionary(0, 5), dictionary(1, 8)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(400, D, generator=g) + 0.5
    y = x + 0.3 * torch.randn(400, D, generator=g)
    stream, writers = Stream(earlier, later), [Writer(tmp_path / name, n) for name, n in (("a", 5), ("b", 8))]
    for before, after in zip(x.split(170), y.split(170), strict=True):
        active = earlier.encode(before), later.encode(after)
        stream.add(after, before, active)
        for writer, own in zip(writers, active, strict=True):
            writer.add(own)
    f, h = dense(earlier.encode(x), 5).double(), dense(later.encode(y), 8).double()
    W_dec, W_enc = earlier.parameters.W_dec.double(), later.parameters.W_enc.double()

    def above(part: torch.Tensor) -> torch.Tensor:  # [rows, ...] of each later latent
        return h.T @ (part - part.mean(0)) / h.sum(0)[:, None]

    supplied = stream.supplied()
    for found, part in zip(supplied, (y.double() @ W_enc, x.double() @ W_enc, f @ W_dec @ W_enc), strict=True):
        torch.testing.assert_close(found, above(part).diagonal(), rtol=1e-4, atol=1e-5)
    supply, weights = above(f) * (W_dec @ W_enc).T, (W_dec @ W_enc).T
    torch.testing.assert_close(supply.sum(1), supplied.by_latents, rtol=1e-4, atol=1e-5)
    found = stream.inputs(writers[0].close(), writers[1].close(), kept=5)
    for sign, latents, values, own in (
        (1, found.raised_by, found.supply, found.weight),
        (-1, found.lowered_by, found.lowered_supply, found.lowered_weight),
    ):
        for latent, row in enumerate(supply):
            there = [at for at in (sign * row).argsort(descending=True).tolist() if sign * row[at] > 0]
            assert latents[latent].tolist() == there + [-1] * (5 - len(there))
            torch.testing.assert_close(values[latent, : len(there)].double(), row[there], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own[latent, : len(there)], weights[latent, there].float())
    assert torch.equal(found.heaviest, weights.argmax(1))
    assert found.together.tolist() == [bool((f[:, i] * h[:, j]).any()) for j, i in enumerate(found.heaviest.tolist())]


@pytest.mark.parametrize(
    ("writes", "reads", "expected"),
    [
        ("resid_pre.2", "resid_post.2", True), ("resid_post.1", "resid_pre.2", False),  # one place
        ("attn_out.2", "resid_post.2", True), ("mlp_out.2", "resid_pre.3", True), ("mlp_out.2", "resid_pre.2", False),
        ("resid_post.2", "resid_post.1", False), ("resid_post.1", "mlp_out.3", False),
        ("mlp_act.1", "resid_post.3", False), ("one.resid_post.1", "one.resid_post.3", False),
    ],
)  # fmt: skip
def test_what_is_in_the_stream_further_on(writes, reads, expected):
    assert feeds(writes, reads) == expected


def test_figures_by_hand():
    found = distribution(torch.tensor([0.5, NONE, -0.25, 1.0]), torch.tensor([1, 0, 1, 6]))
    assert found["latents"] == 3 and found["mean"] == pytest.approx(1.25 / 3)
    assert found["by_firings"]["mean"] == pytest.approx(6.25 / 8)
    assert [found["quantiles"]["0.5"], found["by_firings"]["quantiles"]["0.5"]] == [0.5, 1.0]
    assert sum(found["histogram"]) == 3 and found["histogram"][0] == found["histogram"][-1] == 1
    assert quantiles(np.arange(1.0, 101), np.ones(100)) == {"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95}
    assert distribution(torch.tensor([NONE]), torch.tensor([0]))["quantiles"] is None
    torch.testing.assert_close(matching.cosines(torch.eye(2), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])),
                               torch.tensor([[0.6], [0.8]]))  # fmt: skip
