"""The compiled CPU kernels: selection bit by bit, any number of threads, memory, and life without a compiler."""

import ctypes
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from sae_kernels import reference
from sae_kernels.cpu import build, kernels
from sae_kernels.row_state import MomentFormat, ParameterFormat, StateOptions
from sae_kernels.shard import Shard
from sae_kernels.stages import LossTerm, RowGradients

BACKENDS = ["auto"] if build.library() else []  # without the kernels there is nothing to compare
SCREENS: list[kernels.Screen] = ["none", "int16"] if BACKENDS else []


def sae_of(W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor, k: int, **settings) -> Shard:
    W_dec = reference.unit_norm(torch.randn(W_enc.shape[1], W_enc.shape[0], generator=torch.Generator().manual_seed(9)))
    settings = {"k_aux": 0, "aux_coefficient": 0.0, "dead_after_tokens": 100, "backend": "auto"} | settings
    return Shard(W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, k=k, **settings)


def assert_selects_as_the_reference(
    x: torch.Tensor, W_enc, b_enc, b_dec, k: int, screen: kernels.Screen
) -> kernels.Screened | None:
    sae = sae_of(W_enc, b_enc, b_dec, k, backend="cpu", screen=screen)
    values, indices = sae.encode(x)
    expected = reference.topk(reference.ordered_pre_activations(x.float(), W_enc, b_enc, b_dec), k)
    assert torch.equal(values, expected.values)
    active = expected.values > 0
    assert torch.equal(indices[active], expected.indices[active])
    return sae.screened


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize(
    "batch, n_latents, d_model, k",
    [
        (1, 8, 4, 1),
        (5, 64, 19, 4),
        (3, 64, 16, 64),
        (65, 1000, 33, 7),
        (129, 4099, 7, 32),
        (70, 700, 576, 200),
        (2, 3, 1, 2),
    ],
)
def test_selection_equals_the_reference_bit_by_bit(batch, n_latents, d_model, k, screen):
    g = torch.Generator().manual_seed(batch)
    x, W_enc = torch.randn(batch, d_model, generator=g), torch.randn(d_model, n_latents, generator=g)
    b_enc, b_dec = torch.randn(n_latents, generator=g), torch.randn(d_model, generator=g)
    assert_selects_as_the_reference(x, W_enc, b_enc, b_dec, k, screen)
    assert_selects_as_the_reference(x.t().contiguous().t().bfloat16(), W_enc, b_enc, b_dec, k, screen)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("k", [1, 3, 32, 500])
def test_equal_values_and_values_one_ulp_apart_are_ordered(k, screen):
    """Many latents share a weight row, so z differs only by b_enc: equal, or one unit in the last place."""
    g = torch.Generator().manual_seed(k)
    d_model, kinds, n_latents = 24, 5, 2000
    x = torch.randn(70, d_model, generator=g)
    W_enc = torch.randn(d_model, kinds, generator=g)[:, torch.randint(kinds, (n_latents,), generator=g)]
    ulps = torch.randint(-2, 3, (n_latents,), generator=g)
    b_enc = torch.ones(n_latents)
    for _ in range(2):
        towards = torch.where(ulps > 0, 2.0, torch.where(ulps < 0, 0.0, b_enc))
        b_enc, ulps = torch.nextafter(b_enc, towards), ulps - ulps.sign()
    assert b_enc.unique().numel() == 5
    assert_selects_as_the_reference(x, W_enc, b_enc, torch.zeros(d_model), k, screen)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("descending", [False, True])
def test_ascending_and_descending_values_are_selected(descending, screen):
    """Ascending z replaces the best k at every latent, which fills the candidates again and again."""
    n_latents = 3000
    b_enc = torch.arange(1, n_latents + 1).float().sort(descending=descending).values
    zeros = torch.zeros(8)
    assert_selects_as_the_reference(torch.zeros(3, 8), torch.zeros(8, n_latents), b_enc, zeros, 40, screen)


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_is_selected_where_nothing_is_positive(screen):
    values, _ = sae_of(torch.zeros(8, 100), torch.full((100,), -1.0), torch.zeros(8), 5, screen=screen).encode(
        torch.ones(3, 8)
    )
    assert torch.equal(values, torch.zeros(3, 5))
    values, _ = sae_of(torch.zeros(8, 100), torch.zeros(100), torch.zeros(8), 5, screen=screen).encode(torch.ones(3, 8))
    assert torch.equal(values, torch.zeros(3, 5))


@pytest.mark.parametrize("screen", SCREENS)
def test_nan_is_never_selected_and_infinity_is_the_largest(screen):
    b_enc = torch.tensor([1.0, float("nan"), float("inf"), 2.0, float("inf")])
    values, indices = sae_of(torch.zeros(4, 5), b_enc, torch.zeros(4), 4, screen=screen).encode(torch.ones(1, 4))
    assert indices.tolist() == [[2, 4, 3, 0]]
    assert values.tolist() == [[float("inf"), float("inf"), 2.0, 1.0]]


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
def test_the_screen_certifies_ordinary_rows_with_hardly_a_candidate_more_than_k():
    g = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(70, 576, generator=g), torch.randn(576, 3000, generator=g)
    counts = assert_selects_as_the_reference(x, W_enc, torch.zeros(3000), torch.zeros(576), 32, "int16")
    assert counts is not None and counts.rows == 70 and counts.uncertified == 0
    assert 32 * 70 <= counts.candidates < 40 * 70


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
@pytest.mark.parametrize("what", ["crowd", "infinite row", "NaN row", "infinite bias", "huge latent", "zeros"])
def test_rows_that_the_screen_cannot_certify_are_counted_and_selected_all_the_same(what):
    g = torch.Generator().manual_seed(1)
    x, W_enc, b_enc = torch.randn(70, 24, generator=g), torch.randn(24, 900, generator=g), torch.zeros(900)
    match what:
        case "crowd":  # more values within the bound of the k-th best than there is room for
            W_enc = W_enc[:, :1] * (1 + torch.randn(900, generator=g) * 1e-4)
        case "infinite row":
            x[3, 5] = torch.inf
        case "NaN row":
            x[3, 5] = torch.nan
        case "infinite bias":
            b_enc[7] = torch.inf
        case "huge latent":  # its norm overflows
            W_enc[:, 7] *= 1e25
        case "zeros":
            x[:] = 0
            b_enc = torch.randn(900, generator=g)
    counts = assert_selects_as_the_reference(x, W_enc, b_enc, torch.zeros(24), 8, "int16")
    assert counts is not None
    low, high = {"crowd": (20, 70), "zeros": (0, 0), "infinite row": (1, 1), "NaN row": (1, 1)}.get(what, (70, 70))
    assert low <= counts.uncertified <= high


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
@pytest.mark.parametrize("exponent", [-30, -25, -23, -20, -18, -12, -7])
@pytest.mark.parametrize("of", ["rows", "latents"])
def test_numbers_whose_squares_are_lost_are_selected_all_the_same(exponent, of):
    g = torch.Generator().manual_seed(3)
    x, W_enc = torch.randn(64, 24, generator=g), torch.randn(24, 4000, generator=g)
    tiny = 10.0**exponent
    x[:40], W_enc = (x[:40] * tiny, W_enc) if of == "rows" else (x[:40], W_enc * tiny)
    assert_selects_as_the_reference(x, W_enc, torch.zeros(4000), torch.zeros(24), 16, "int16")


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
@pytest.mark.parametrize("spread", [1, 100])
def test_a_dimension_that_dwarfs_the_others_is_screened(spread):
    """One dimension decides the scale of int16, as in residual streams; the largest int16 is reached."""
    g = torch.Generator().manual_seed(2)
    x, W_enc = torch.randn(33, 64, generator=g), torch.randn(64, 5000, generator=g)
    x[:, 9] *= spread**2
    W_enc[9] *= spread
    counts = assert_selects_as_the_reference(x, W_enc, torch.randn(5000, generator=g), x.mean(0), 16, "int16")
    assert counts is not None and counts.candidates >= 16 * (counts.rows - counts.uncertified)


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
@pytest.mark.parametrize("d_model", [3, 8, 37, 576])
def test_partial_decodes_and_gradients_of_values_are_the_reference(d_model):
    g = torch.Generator().manual_seed(d_model)
    sae = sae_of(torch.randn(d_model, 50, generator=g), torch.zeros(50), torch.ones(d_model), 6)
    W_dec, error = sae.W_dec, torch.randn(21, d_model, generator=g)
    there = torch.rand(21, 6, generator=g) < 0.7  # empty places anywhere; values of any sign
    indices = torch.where(there, torch.randint(50, (21, 6), generator=g), reference.EMPTY)
    selected = reference.Selected(torch.where(there, torch.randn(21, 6, generator=g), 0.0), indices)
    expected = reference.sparse_decode(
        selected.values.double(), selected.indices, W_dec.double(), torch.zeros(d_model).double()
    )
    torch.testing.assert_close(sae.stages.partial(selected), expected.float())
    expected = 0.5 * reference.gather_dot(error.double(), W_dec.double(), selected.indices) * there
    torch.testing.assert_close(sae.stages.d_z(error, selected, scale=0.5), expected.float())


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
def test_rounding_to_bf16_is_torchs():
    """Every kind of fp32 number; subnormal ones count as zero."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-(2**31), 2**31, (64, 999), generator=g).int().view(torch.float32)
    x[0, :8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3961e38, 1 + 2**-8, 1 + 3 * 2**-8])
    sae = sae_of(x.t(), torch.zeros(64), torch.zeros(999), 2)
    expected = torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros(()), x).bfloat16()
    rounded = sae._kernels.rounded[:, :999]  # type: ignore[union-attr]
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("dead", [10, 900])  # AuxK dense, AuxK sparse
@pytest.mark.parametrize("options", [StateOptions(), StateOptions("bfloat16_stochastic", "factored")])
def test_any_number_of_threads_gives_the_same_step_bitwise(options, dead, screen):
    g = torch.Generator().manual_seed(0)
    threads, states = torch.get_num_threads(), []
    W_enc, x = torch.randn(24, 1000, generator=g), torch.randn(700, 24, generator=g)
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        sae = sae_of(
            W_enc, torch.zeros(1000), torch.zeros(24), 8, k_aux=16, aux_coefficient=0.1, screen=screen, state=options
        )
        sae.tokens_since_fired[:dead] = 1000
        for _ in range(2):
            sae.step(x, lr=1e-2, variance=1.0)
        states.append(sae.state_dict())
    torch.set_num_threads(threads)
    for other in states[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, states[0][name]), name


COMPACT = [StateOptions(*both, seed=5) for both in product(get_args(ParameterFormat), get_args(MomentFormat))][1:]


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
@pytest.mark.parametrize("options", COMPACT)
@pytest.mark.parametrize("n_latents, d_model, unit", [(130, 24, True), (70, 97, False), (5, 1, True), (4200, 33, True)])
def test_compact_rows_are_updated_to_the_bits_of_plain_torch(n_latents, d_model, unit, options):
    """From gradients over six decades, a third of them zero; every tensor of the state, on any number of threads."""

    def updated(backend: Literal["cpu", "torch"], threads: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(d_model)
        W_enc = torch.randn(d_model, n_latents, generator=g)
        sae = sae_of(
            W_enc, torch.zeros(n_latents), torch.zeros(d_model), 1, state=options, unit=unit, first_latent=7,
            backend=backend,
        )  # fmt: skip
        torch.set_num_threads(threads)
        for _ in range(3):
            size = 10.0 ** torch.randint(-6, 1, (2, n_latents, 1), generator=g)
            size *= torch.rand(2, n_latents, 1, generator=g) > 1 / 3
            enc, dec = torch.randn(2, n_latents, d_model, generator=g) * size
            hyper = sae.begin_update_(1e-2)
            sae.stages.update_latents_(RowGradients(enc, dec, enc.sum(1), enc.sum(0)), hyper)
            sae.stages.update_b_dec_(dec.sum(0), hyper)
        return sae.state_dict()

    threads = torch.get_num_threads()
    try:
        expected = updated("torch", 1)
        for n in (1, 3):
            for name, tensor in updated("cpu", n).items():
                assert torch.equal(tensor, expected[name]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_needs_less_memory_than_one_byte_for_every_row_and_latent(backend):
    batch, n_latents = 4096, 32768
    sae = sae_of(torch.randn(4, n_latents), torch.zeros(n_latents), torch.zeros(4), 4, k_aux=8, backend=backend)
    sae.tokens_since_fired[: n_latents // 2] = 1000
    x = torch.randn(batch, 4)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak of resident memory
    before = _status("VmRSS")
    sae.step(x, lr=1e-3, variance=1.0)
    assert _status("VmHWM") - before < batch * n_latents


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
def test_what_is_held_for_the_gradients_stays_the_callers():
    g = torch.Generator().manual_seed(0)
    sae, x = sae_of(torch.randn(24, 100, generator=g), torch.zeros(100), torch.zeros(24), 4), torch.randn(9, 24)
    rows, errors = sae.stages.rows(x), torch.randn(9, 24, generator=g)
    selected = sae.stages.select(rows, k=4)
    part = LossTerm(
        errors, selected, sae.stages.d_z(errors, selected, scale=-1), -1.0
    )  # an int would be another register
    sae.stages.save_for_backward_(rows, [part])
    before = rows.clone(), errors.clone()
    sae.forward(x + 1, variance=1.0)
    assert torch.equal(rows, before[0]) and torch.equal(errors, before[1])


@pytest.mark.skipif(not BACKENDS, reason="no kernels")
def test_adams_other_share_is_not_rounded():
    sae = sae_of(torch.zeros(3, 5), torch.zeros(5), torch.zeros(3), 1, betas=(0.9, 0.999999))
    gradients = reference.Gradients(torch.ones(3, 5), torch.zeros(5, 3), torch.zeros(5), torch.zeros(3))
    sae.update_(gradients, lr=1.0)
    torch.testing.assert_close(sae.W_enc, torch.full((3, 5), -1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "settings, cure",
    [
        ({"backend": "triton", "product_dtype": torch.float32}, "use auto or torch"),
        ({"backend": "torch", "screen": "int16"}, "use auto"),
        ({"state": StateOptions("float32", "int8"), "backend": "triton"}, "use auto or torch"),
    ],
)
def test_what_a_backend_would_not_do_is_refused(settings, cure):
    with pytest.raises(ValueError, match=cure):
        sae_of(torch.zeros(4, 8), torch.zeros(8), torch.zeros(4), 2, **settings)


@pytest.mark.slow
@pytest.mark.skipif(not BACKENDS, reason="no kernels")
def test_a_damaged_library_is_compiled_again(monkeypatch, caplog, tmp_path):
    compiler = build._compiler()
    assert compiler is not None
    monkeypatch.setenv("SAE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-std=c++20", "-O0", "-march=native", "-shared", "-fPIC", "-pthread"))
    path = build.built(compiler)
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert isinstance(build._load(), ctypes.CDLL)
    assert "is not what was written; compiling it again" in caplog.text and build.is_sound(path)
    (tmp_path / "empty").touch()  # not the loaded file: cut short, it would crash this process when it exits
    assert not build.is_sound(tmp_path / "empty")


@pytest.mark.parametrize("lack", ["compiler", "processor", "working compiler", "room"])
def test_without_its_toolchain_one_warning_says_why_and_torch_takes_over(lack, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("SAE_KERNELS_CACHE", str(tmp_path))
    match lack:
        case "compiler":
            monkeypatch.setenv("CXX", "no-such-compiler")
        case "processor":
            monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2"}))
        case "working compiler":
            monkeypatch.setenv("CXX", "false")
        case "room":
            (tmp_path / "file").touch()
            monkeypatch.setenv("SAE_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    if lack != "processor":
        monkeypatch.setattr(build, "cpu_flags", lambda: build.NEEDED)
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                sae = sae_of(torch.randn(4, 8), torch.zeros(8), torch.zeros(4), 2)
                assert sae.backend_used == "torch"
                sae.step(torch.randn(3, 4), lr=1e-3, variance=1.0)
        assert len(caplog.records) == 1
        why = {"compiler": "no C++ compiler", "processor": "no fma", "working compiler": "failed"}
        assert why.get(lack, "SAE_KERNELS_CACHE=FOLDER names a folder") in caplog.text
    finally:
        build.library.cache_clear()


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path):
    program = "from sae_kernels.cpu.build import library, NEEDED, cpu_flags; assert library() or NEEDED - cpu_flags()"
    environment = os.environ | {"SAE_KERNELS_CACHE": str(tmp_path), "PYTHONPATH": str(Path(build.__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("*.so"))) == (1 if BACKENDS else 0)


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["cooperlake", "haswell", "alderlake"])
def test_the_library_compiles_for_processors_of_every_kind(processor, tmp_path):
    """AVX-512 with BF16, AVX2, AVX2 with VNNI; what this processor can run must add in the documented order."""
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("no compiler")
    source = next(s for s in build.SOURCES if s.suffix == ".cpp")
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in build.FLAGS]
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "sae_cpu.so")], check=True)
    if {"avx2", "fma", "bmi2"} <= build.cpu_flags() and processor == "haswell":
        assert build.adds_in_documented_order(ctypes.CDLL(str(tmp_path / "sae_cpu.so")))
