"""Compact state against fp32 Adam: roundings by hand-worked probabilities, bounds, bytes, and who may not matter."""

from collections.abc import Callable

import pytest
import torch
from sae_kernels import eight_bit, row_state
from sae_kernels.ordered import factored_adam_
from sae_kernels.reference import adam_, remove_parallel, unit_norm
from sae_kernels.row_state import Hyper, RowState, StateOptions
from sae_kernels.stochastic import random_bits, round_bfloat16

OPTIONS = [StateOptions(p, m) for p in ("float32", "bfloat16_stochastic") for m in ("float32", "int8", "factored")]
EVERY_16 = torch.arange(1 << 16, dtype=torch.int32)[None]  # all that the lower 16 bits can be
ROWS = 160  # more than are updated at once, where blocks are cut small
HYPER = {"betas": (0.9, 0.999), "eps": 6.25e-10}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("numerator", [0, 1, 13, 64, 127])
def test_rounding_to_bf16_goes_up_with_the_probability_of_the_distance(sign, numerator):
    """Between 1 and its upper neighbour 1 + 2^-7, at 1 + (numerator / 128) 2^-7, over all random bits."""
    x = torch.full((1, 1 << 16), sign * (1 + numerator * 2.0**-14))
    rounded = round_bfloat16(x, EVERY_16).float() * sign
    assert set(rounded.unique().tolist()) <= {1.0, 1 + 2.0**-7}
    assert float((rounded > 1).double().mean()) == numerator / 128


def test_rounding_leaves_infinities_nan_and_bf16_numbers_alone():
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -2.5, 3e38]]).bfloat16().float()
    for bits in (0, -1, 0x7FFFFFFF):
        rounded = round_bfloat16(x, torch.full_like(x, bits, dtype=torch.int32)).float()
        torch.testing.assert_close(rounded, x, rtol=0, atol=0, equal_nan=True)


def test_random_bits_are_uniform_and_follow_from_seed_step_stream_latent_and_dimension_alone():
    given = {"seed": 5, "step": 7, "stream": 1}
    bits = random_bits(torch.arange(1000), 300, **given)
    part = random_bits(torch.tensor([17, 3, 999]), 300, **given)
    assert torch.equal(part, bits[[17, 3, 999]])
    for changed in ("seed", "step", "stream"):
        other = random_bits(torch.arange(1000), 300, **{**given, changed: 2})
        assert float((other == bits).float().mean()) < 1e-4
    each = (bits[..., None] >> torch.arange(32)) & 1
    assert float((each.float().mean((0, 1)) - 0.5).abs().max()) < 0.005  # 5 standard deviations of 300,000 draws
    uniform = (bits & 0xFFFF).double() / 2**16
    for a, b in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01


@pytest.mark.parametrize("encode, decode, least", [
    (eight_bit.encode_signed, eight_bit.decode_signed, 2.0**-15),
    (eight_bit.encode_unsigned, eight_bit.decode_unsigned, 2.0**-31),
])  # fmt: skip
def test_eight_bits_are_off_by_an_eighth_at_most_and_never_change_twice(encode, decode, least):
    x = normal(40, 512) * torch.logspace(-9, 0, 512)  # one row's blocks span nine decades
    x = x.abs() if encode is eight_bit.encode_unsigned else x
    bits = random_bits(torch.arange(40), 512, seed=0, step=0, stream=0)
    once = decode(encode(x, bits))
    largest = x.abs().view(40, 2, 256).amax(-1).repeat_interleave(256, 1)
    assert bool(((once - x).abs() <= torch.maximum(x.abs() / 8, least * largest)).all())
    assert torch.equal(once.sign()[once != 0], x.sign()[once != 0])
    torch.testing.assert_close(decode(encode(once, bits.flip(0))), once, rtol=3e-7, atol=0)  # codes are fixed points


def test_eight_bits_are_unbiased_between_any_two_codes():
    """All 2^20 random bits on values at known places between neighbours; the block's largest is 1.875, the scale 1."""
    every = torch.arange(0, 1 << 20, 16, dtype=torch.int32)[:, None]
    for x, lower, upper in (
        (1.03125, 1.0, 1.125),
        (0.3, 0.28125, 0.3125),
        (2.0**-14 * 1.1, 2.0**-14, 2.0**-14 * 1.125),
    ):
        rows = torch.tensor([[x, 1.875]]).expand(len(every), 2).contiguous()
        for encode, decode in (
            (eight_bit.encode_signed, eight_bit.decode_signed), (eight_bit.encode_unsigned, eight_bit.decode_unsigned)
        ):  # fmt: skip
            decoded = decode(encode(rows, every.expand(-1, 2)))[:, 0]
            assert set(decoded.unique().tolist()) == {lower, upper}
            assert float(decoded.double().mean()) == pytest.approx(x, rel=1e-5)
    tiny = torch.tensor([[2.0**-17, 1.875]]).expand(len(every), 2).contiguous()
    first = eight_bit.decode_signed(eight_bit.encode_signed(tiny, every.expand(-1, 2)))[:, 0]
    assert float(first.double().mean()) == pytest.approx(2.0**-17, rel=1e-4)  # between zero and the first code


def test_a_second_moment_is_never_rounded_to_zero():
    x = torch.tensor([[1.0, 1e-12, 0.0]])
    decoded = eight_bit.decode_unsigned(eight_bit.encode_unsigned(x, torch.zeros(1, 3, dtype=torch.int32)))
    assert (decoded > 0).tolist() == [[True, True, False]]


def test_a_second_moment_in_eight_bits_still_decays():
    """After five hundred steps of 0.1 % a code's width is far away; rounded to nearest it would not have moved."""
    v = eight_bit.Coded(torch.full((64, 256), 255, dtype=torch.uint8), torch.ones(64, 1))
    for step in range(500):
        bits = random_bits(torch.arange(64), 256, seed=0, step=step, stream=0)
        v = eight_bit.encode_unsigned(eight_bit.decode_unsigned(v) * 0.999, bits)
    decayed = eight_bit.decode_unsigned(v).double() / 1.875
    assert float(decayed.mean()) == pytest.approx(0.999**500, rel=0.02)  # 16,384 walks, each off by a fifth


@pytest.mark.parametrize("options", OPTIONS)
def test_bytes_a_parameter_are_what_the_table_says(options):
    state = RowState(normal(64, 512), options, stream=0)
    stored = state.value.nbytes + sum(tensor.nbytes for tensor in state.moments.values())
    by_parameters = {"float32": 4, "bfloat16_stochastic": 2}
    by_moments = {"float32": 8, "int8": 2 + 2 * 4 / 256, "factored": 1 + 4 / 256 + 4 / 512 + 4 / 64}
    assert stored / (64 * 512) == by_parameters[options.parameters] + by_moments[options.moments]


def run(options: StateOptions, steps: int = 30, *, parts: tuple[int, ...] = (ROWS,), unit: bool = True) -> torch.Tensor:
    """The rows after Adam on a noisy quadratic, in shards of the given sizes."""
    target, value = normal(ROWS, 96, seed=1), unit_norm(normal(ROWS, 96))
    starts = [sum(parts[:i]) for i in range(len(parts))]
    shards = [
        RowState(value[start : start + size], options, stream=1, first_latent=start)
        for start, size in zip(starts, parts, strict=True)
    ]
    for step in range(1, steps + 1):
        noise, hyper = normal(ROWS, 96, seed=100 + step), Hyper(step, lr=1e-2, **HYPER)

        def gradient(shard: RowState, start: int) -> Callable[[slice], torch.Tensor]:
            def of(rows: slice) -> torch.Tensor:
                here = slice(start + rows.start, start + rows.stop)
                return shard.value[rows].float() - target[here] + noise[here]  # noqa: B023

            return of

        squares = [s.update_(gradient(s, start), hyper, unit=unit) for s, start in zip(shards, starts, strict=True)]
        if squares[0] is not None:
            for shard in shards:
                shard.update_column_(torch.stack(squares).sum(0), hyper, n_latents=ROWS)
    return torch.cat([shard.value for shard in shards]).float()


def test_float32_state_is_adam_bit_for_bit_however_rows_are_cut(monkeypatch):
    target, value = normal(ROWS, 96, seed=1), unit_norm(normal(ROWS, 96))
    first, second = torch.zeros(ROWS, 96), torch.zeros(ROWS, 96)
    for step in range(1, 31):
        gradient = remove_parallel(value - target + normal(ROWS, 96, seed=100 + step), value)
        adam_(value, gradient, first, second, step=step, lr=1e-2, **HYPER)
        value = unit_norm(value)
    for chunk in (1 << 18, 96 * 7):
        monkeypatch.setattr(row_state, "IN_CACHE", chunk)
        assert torch.equal(run(StateOptions()), value)


@pytest.mark.parametrize("options", OPTIONS)
def test_shards_and_blocks_do_not_change_a_row(options, monkeypatch):
    whole = run(options, 10)
    monkeypatch.setattr(row_state, "IN_CACHE", 96 * 5)
    cut = run(options, 10, parts=(10, 33, 117))
    if options.moments == "factored":  # its sum over latents is fp64, rounded to fp32
        torch.testing.assert_close(cut, whole, rtol=0, atol=2**-8 if options.parameters != "float32" else 1e-6)
    else:
        assert torch.equal(cut, whole)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_gets_as_far_as_adam(options, adams_distance):
    """After 150 steps the mean squared distance to the optimum is Adam's, or less, within a tenth."""
    assert distance(run(options, 150, unit=False)) < 1.1 * adams_distance


@pytest.fixture(scope="module")
def adams_distance() -> float:
    return distance(run(StateOptions(), 150, unit=False))


def distance(rows: torch.Tensor) -> float:
    return float((rows - normal(ROWS, 96, seed=1)).square().mean())


def test_factored_moments_are_adam_where_the_second_moment_is_a_product():
    """Gradients with |g| = row x column, of any sign: v factors, so from the second step on both agree."""
    rows, columns = 1 + normal(8, 1).abs(), 1 + normal(1, 12, seed=1).abs()
    ours, theirs = torch.zeros(8, 12), torch.zeros(8, 12)
    first, second, row, column = torch.zeros(8, 12), torch.zeros(8, 12), torch.zeros(8), torch.zeros(12)
    first_ours = torch.zeros(8, 12)
    for step in range(1, 6):
        gradient = rows * columns * normal(8, 12, seed=step).sign()
        before = ours.clone(), theirs.clone()
        profile = column / column.mean() if step > 1 else torch.ones(12)
        factored_adam_(ours, gradient, first_ours, row, profile, step=step, lr=1e-3, **HYPER)
        adam_(theirs, gradient, first, second, step=step, lr=1e-3, **HYPER)
        column.lerp_(gradient.square().mean(0), 1 - 0.999)
        if step > 1:
            torch.testing.assert_close(ours - before[0], theirs - before[1], rtol=1e-4, atol=1e-8)


def test_a_factored_update_is_cut_back_to_a_root_mean_square_of_one():
    first, row, parameter = torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, 4)
    profile = torch.tensor([1e-6, 4 / 3, 4 / 3, 4 / 3])
    factored_adam_(parameter, torch.ones(1, 4), first, row, profile, step=1, lr=1.0, **HYPER)
    assert float(parameter.square().mean().sqrt()) == pytest.approx(1)
