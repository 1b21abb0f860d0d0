"""Twins: what a dictionary shares with another one, where the answer is known."""

import torch
from sae_kernels.reference import unit_norm

from sae_dist.evaluate import twins
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

N, D = 60, 200  # random directions in 200 dimensions are far from one another


def made(seed: int, order: torch.Tensor | None = None) -> Dictionary:
    W_dec = unit_norm(torch.randn(N, D, generator=torch.Generator().manual_seed(seed)))
    W_dec = W_dec if order is None else W_dec[order]
    parameters = Parameters(3 * W_dec.T, W_dec, torch.zeros(N), torch.zeros(D))
    return Dictionary(parameters=parameters, k=4, info={"variant": "topk"})


def test_the_same_latents_in_another_order_are_all_shared_and_others_are_not():
    every, order = torch.arange(N), torch.randperm(N, generator=torch.Generator().manual_seed(2))
    shared = twins.match(made(0), made(0, order), alive=every, their_alive=every)
    assert (shared.shared, shared.shared_decoder) == (1, 1) and abs(shared.mean_cosine - 1) < 1e-5
    strangers = twins.match(made(0), made(1), alive=every, their_alive=every)
    assert (strangers.shared, strangers.shared_decoder) == (0, 0)
    half = twins.match(made(0), made(0, order), alive=every, their_alive=(order < N // 2).nonzero().squeeze(1))
    assert half.shared == half.shared_decoder == 0.5  # of those that are alive there


def test_a_latent_is_matched_once_and_with_its_encoder_too():
    every, twice = torch.arange(N), torch.arange(N) // 2
    doubled = twins.match(made(0, twice), made(0), alive=every, their_alive=every)
    assert (doubled.shared, doubled.shared_decoder) == (0.5, 1)
    turned = made(0)
    turned.parameters.W_enc.neg_()
    other_way = twins.match(made(0), turned, alive=every, their_alive=every)
    assert (other_way.shared, other_way.shared_decoder) == (0, 1)


def test_only_latents_that_are_active_on_the_given_rows_count():
    ours, x = made(0), made(0).parameters.W_dec[:10]
    compared = twins.compare(ours, made(0), x, main={"fvu": 0.5, "l0": None}, twin={"fvu": 0.75, "l0": 1.0})
    assert compared["shared"] == 1 and compared["gaps"] == {"fvu": -0.25}
    few = ours.encode(x).indices.unique()
    assert 10 <= len(few) < N
