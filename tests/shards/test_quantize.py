"""Quantised rows: the error is what arithmetic says, and what the store says it is."""

import pytest
import torch

from sae_dist import storage
from sae_dist.shards import quantize, stores, writer
from tests.shards import predictable


def normal(rows: int = 512, width: int = 256) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def test_int8_errs_by_a_uniform_rounding_error():
    x = normal()
    error, square = quantize.squared_error(x, quantize.encode(x, "int8"), "int8")
    steps = x.abs().amax(1) / 127
    predicted = float((steps**2 / 12).sum() * x.shape[1])  # the variance of a uniform error of one step
    assert error == pytest.approx(predicted, rel=0.02)
    assert error / square < 1e-4


def test_fp8_errs_by_its_three_bits_of_mantissa():
    x = normal()
    error, square = quantize.squared_error(x, quantize.encode(x, "float8_e4m3"), "float8_e4m3")
    assert 2e-4 < error / square < 1e-3  # 2^-4 relative at most, its square over 3 on average: about 6e-4


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_scaling_a_row_scales_what_is_stored(dtype):
    x = normal(4)
    factors = torch.tensor([1e-20, 1.0, 2.0**10, 1e20])[:, None]
    plain, scaled = (quantize.encode(v, dtype) for v in (x, x * factors))
    assert (plain.bits.int() - scaled.bits.int()).abs().max() <= 1  # rounding of x / scale may differ in the last place
    torch.testing.assert_close(scaled.scale, plain.scale * factors[:, 0])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_zeros_and_the_largest_value_are_kept(dtype):
    x = torch.zeros(2, 8)
    x[1, 3] = -5.5
    got = quantize.decode(*quantize.encode(x, dtype), dtype)
    assert torch.equal(got.float(), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3", "float32"])
def test_the_store_reports_the_error_that_its_rows_have(tmp_path, dtype):
    store = writer.create(storage.open(tmp_path), predictable.meta(dtype=dtype, hooks={"resid_post.1": 256}))
    x, rows = normal(96), predictable.rows_of(0, 96)
    commit = writer.write_unit(store, 0, {"resid_post.1": x}, **rows)
    key = {pair: i for i, pair in enumerate(zip(rows["doc"].tolist(), rows["pos"].tolist(), strict=True))}
    error = 0.0
    for i in range(len(commit.shards["resid_post.1"].slices)):
        part = stores.open(store.storage).read_slice("resid_post.1", 0, i)
        source = x[[key[int(d), int(p)] for d, p in zip(part.doc, part.pos, strict=True)]]
        stored = part.bits.view({"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8,
                                 "float8_e4m3": torch.float8_e4m3fn}[dtype]).float()  # fmt: skip
        stored = stored if part.scale is None else stored * part.scale[:, None]
        error += float(((source - stored) ** 2).sum())
    assert commit.shards["resid_post.1"].relative_error == pytest.approx(error / float((x**2).sum()), rel=1e-4)
