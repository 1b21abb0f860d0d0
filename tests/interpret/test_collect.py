"""What is collected in one pass equals what a plain loop over all activations finds."""

import hashlib

import numpy as np
import pytest
import torch
from sae_kernels import Active, Selected, packed
from sae_kernels.reference import EMPTY

from sae_dist.interpret.collect import UNLABELLED, Collected, PagesConfig, collect, paged_latents
from sae_dist.interpret.contexts import TOP, choose, shade

N_LATENTS, N_DOCS, LENGTH, K = 12, 40, 30, 4
CONFIG = PagesConfig(top_contexts=4, intervals=3, interval_contexts=2, tokens_before=3, tokens_after=2)


def doc_id(i: int) -> int:
    return int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:8], "big")  # the upper bit is set in about half


def category(doc: int) -> str | None:
    return CATEGORY[doc]


CATEGORY = {doc_id(i): ("code", "prose", None)[i % 3] for i in range(N_DOCS)}


@pytest.fixture(scope="module")
def corpus() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x holds the row's values and indices; the encoder of these tests only unpacks them."""
    g = torch.Generator().manual_seed(0)
    n = N_DOCS * LENGTH
    indices = torch.stack([torch.randperm(N_LATENTS - 1, generator=g)[:K] for _ in range(n)])  # the last one is silent
    values = torch.randn(n, K, generator=g).mul(2).exp().mul(torch.rand(n, K, generator=g) > 0.3)
    docs = torch.from_numpy(np.array([doc_id(i) for i in range(N_DOCS)], dtype=np.uint64))
    order = torch.randperm(n, generator=g)
    doc = docs.view(torch.int64).repeat_interleave(LENGTH)[order].view(torch.uint64)
    return torch.cat([values, indices], 1)[order], doc, torch.arange(n).remainder(LENGTH)[order].to(torch.uint32)


def encode(x: torch.Tensor) -> Active:
    return packed(Selected(x[:, :K], torch.where(x[:, :K] > 0, x[:, K:].long(), EMPTY)))


def batches(corpus, size: int):
    x, doc, pos = corpus
    for start in range(0, len(x), size):
        yield x[start : start + size], doc[start : start + size], pos[start : start + size]


def collected(corpus, size: int = 100, config: PagesConfig = CONFIG) -> Collected:
    return collect(batches(corpus, size), encode, n_latents=N_LATENTS, category=category, config=config)


def firings(corpus) -> list[tuple[int, float, int, int]]:
    """(latent, value, doc, pos) of every activation, row by row."""
    x, doc, pos = corpus
    return [
        (int(latent), value, d, p)
        for row, d, p in zip(x.tolist(), doc.tolist(), pos.tolist(), strict=True)
        for value, latent in zip(row[:K], row[K:], strict=True)
        if value > 0
    ]


def test_of_latents_with_a_sign_the_positive_side_is_collected(corpus):
    def signed(x: torch.Tensor) -> Active:
        """The same, and every latent that is silent on a row at -3."""
        dense = torch.full((len(x), N_LATENTS), -3.0)
        own = encode(x)
        dense[own.rows, own.indices] = own.values
        offsets = torch.arange(len(x) + 1) * N_LATENTS
        return Active(dense.flatten(), torch.arange(N_LATENTS).repeat(len(x)), offsets)

    plain = collected(corpus)
    found = collect(batches(corpus, 100), signed, n_latents=N_LATENTS, category=category, config=CONFIG)
    for name in ("firings", "maximum", "exponent", "histogram", "category_count"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    torch.testing.assert_close(found.total, plain.total)


def test_statistics_are_those_of_a_plain_loop(corpus):
    c = collected(corpus)
    assert c.rows == N_DOCS * LENGTH
    for latent in range(N_LATENTS):
        mine = [value for i, value, _, _ in firings(corpus) if i == latent]
        assert c.firings[latent] == len(mine)
        assert c.total[latent].item() == pytest.approx(sum(mine), rel=1e-12)
        assert c.maximum[latent].item() == max(mine, default=0.0)
        if mine:
            edges = 2.0 ** int(c.exponent[latent]) * np.arange(c.histogram.shape[1] + 1) / c.histogram.shape[1]
            assert np.array_equal(c.histogram[latent].numpy(), np.histogram(mine, edges)[0])
            assert edges[-1] / 2 <= max(mine) < edges[-1]


def test_categories_count_firings_and_activation(corpus):
    c = collected(corpus)
    assert c.categories == ("code", "prose", UNLABELLED)
    assert c.category_rows.tolist() == [14 * LENGTH, 13 * LENGTH, 13 * LENGTH]
    for name, count, total in zip(c.categories, c.category_count.T, c.category_total.T, strict=True):
        for latent in range(N_LATENTS):
            mine = [v for i, v, doc, _ in firings(corpus) if i == latent and (category(doc) or UNLABELLED) == name]
            assert count[latent] == len(mine)
            assert total[latent].item() == pytest.approx(sum(mine), rel=1e-12)


def test_without_labels_there_are_no_categories(corpus):
    c = collect(batches(corpus, 100), encode, n_latents=N_LATENTS, category=lambda doc: None, config=CONFIG)
    assert c.categories == () and c.category_total.shape == (N_LATENTS, 0)


def test_batch_boundaries_change_nothing_at_all(corpus):
    def flat(c: Collected) -> list:
        return [part for field in c for part in (field if isinstance(field, tuple) else (field,))]

    for one, other in zip(flat(collected(corpus, 1200)), flat(collected(corpus, 7)), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_the_order_of_rows_does_not_change_the_contexts(corpus):
    shuffled = torch.randperm(len(corpus[0]), generator=torch.Generator().manual_seed(5))
    x, doc, pos = corpus
    other = x[shuffled], doc.view(torch.int64)[shuffled].view(torch.uint64), pos.to(torch.int64)[shuffled]
    for one, two in zip(choose(collected(corpus), CONFIG)[0], choose(collected(other), CONFIG)[0], strict=True):
        assert torch.equal(one, two)


def test_only_the_first_tokens_are_looked_at(corpus):
    some = collected(corpus, size=100, config=PagesConfig(tokens=250))
    x, doc, pos = corpus
    same = collected((x[:250], doc[:250], pos[:250]), config=PagesConfig())
    assert some.rows == 250 and torch.equal(some.histogram, same.histogram)


def test_top_contexts_are_the_strongest_of_passages_that_do_not_show_each_other(corpus):
    contexts, _ = choose(collected(corpus), CONFIG)
    for latent in range(N_LATENTS):
        mine = (contexts.slot == latent) & (contexts.interval == TOP)
        shown = list(
            zip(contexts.value[mine].tolist(), contexts.doc[mine].tolist(), contexts.pos[mine].tolist(), strict=True)
        )
        best = sorted((v for i, v, _, _ in firings(corpus) if i == latent), reverse=True)
        assert [v for v, _, _ in shown] == sorted((v for v, _, _ in shown), reverse=True)
        assert not best or shown[0][0] == best[0]
        for a, (_, doc, pos) in enumerate(shown):
            assert not any(d == doc and -3 <= pos - p <= 2 for _, d, p in shown[:a])


def test_samples_are_not_in_sight_of_the_top_contexts(corpus):
    contexts, _ = choose(collected(corpus), CONFIG)
    columns = zip(*(column.tolist() for column in contexts), strict=True)
    rows = [(slot, interval == TOP, doc, pos) for slot, interval, _, doc, pos in columns]
    assert any(not top for _, top, _, _ in rows)
    for slot, top, doc, pos in rows:
        shown = [p for s, t, d, p in rows if t and s == slot and d == doc]
        assert top or not any(-3 <= pos - p <= 2 for p in shown)


def test_samples_lie_in_their_interval_and_intervals_count_all_firings(corpus):
    c = collected(corpus)
    contexts, intervals = choose(c, CONFIG)
    assert intervals.firings.sum(1).tolist() == c.firings.tolist()
    sampled = contexts.interval != TOP
    low = intervals.edges[contexts.slot, contexts.interval][sampled]
    high = intervals.edges[contexts.slot, contexts.interval + 1][sampled]
    value = contexts.value[sampled]
    assert len(value) > 0 and ((low <= value) & (value <= high)).all()


def test_every_firing_is_equally_likely_to_be_sampled():
    """10 of 200 firings, spread over all bins, with 300 seeds: every one is expected 15 times."""
    n, seeds = 200, 300
    x = torch.stack([torch.linspace(0.01, 1.9, n), torch.zeros(n)], 1)
    rows = [(x, torch.zeros(n), torch.arange(n) * 10)]
    counts = torch.zeros(n)
    for seed in range(seeds):
        config = PagesConfig(
            top_contexts=1, intervals=1, interval_contexts=10, seed=seed, tokens_before=0, tokens_after=0
        )
        c = collect(
            rows, lambda x: packed(Selected(x[:, :1], x[:, 1:].long())), n_latents=1, category=lambda doc: None,
            config=config,
        )  # fmt: skip
        contexts, _ = choose(c, config)
        counts += (contexts.pos[contexts.interval != TOP] // 10).bincount(minlength=n)
    others = counts[:-1]  # the strongest is a top context and not repeated
    chi_square = ((others - others.mean()) ** 2 / others.mean()).sum()  # about 198 degrees of freedom, less by 1/20
    assert counts[-1] == 0 and others.sum() == 10 * seeds and 130 < chi_square < 260


def test_neighbours_are_the_activations_that_the_stream_holds(corpus):
    c = collected(corpus)
    contexts, _ = choose(c, CONFIG)
    shading = shade(batches(corpus, 77), encode, collected=c, contexts=contexts, config=CONFIG)
    value = {(latent, np.uint64(doc).view(np.int64).item(), pos): v for latent, v, doc, pos in firings(corpus)}
    for i, (slot, doc, pos) in enumerate(
        zip(contexts.slot.tolist(), contexts.doc.tolist(), contexts.pos.tolist(), strict=True)
    ):
        span = slice(int(shading.start[i]), int(shading.start[i + 1]))
        found = dict(zip(shading.offset[span].tolist(), shading.value[span].tolist(), strict=True))
        assert found == {o: v for o in range(-3, 3) if (v := value.get((slot, doc, pos + o)))}


def test_a_large_dictionary_shows_a_sample_of_its_latents(corpus):
    config = PagesConfig(max_latents=5, top_contexts=4, interval_contexts=2, tokens_before=3, tokens_after=2)
    paged = paged_latents(N_LATENTS, config)
    some, all_ = collected(corpus, config=config), collected(corpus)
    assert len(paged) == 5 and torch.equal(paged, paged.sort().values)
    assert torch.equal(some.histogram, all_.histogram)
    assert torch.equal(some.top.key, all_.top.key[paged])
