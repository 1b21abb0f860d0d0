"""The compiled CPU kernels: selection bit by bit, any number of threads, memory, and life without a compiler."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_kernels import reference
from sae_kernels.cpu import build
from sae_kernels.topk_step import TopKStep

BACKENDS = ["auto"] if build.library() else []  # without the kernels there is nothing to compare


def sae_of(W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor, k: int, **settings) -> TopKStep:
    W_dec = reference.unit_norm(torch.randn(W_enc.shape[1], W_enc.shape[0], generator=torch.Generator().manual_seed(9)))
    settings = {"k_aux": 0, "aux_coefficient": 0.0, "dead_after_tokens": 100, "backend": "auto"} | settings
    return TopKStep(W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, k=k, **settings)


def assert_selects_as_the_reference(x: torch.Tensor, W_enc, b_enc, b_dec, k: int, backend: str) -> None:
    values, indices = sae_of(W_enc, b_enc, b_dec, k, backend=backend).encode(x)
    expected = reference.topk(reference.ordered_pre_activations(x.float(), W_enc, b_enc, b_dec), k)
    assert torch.equal(values, expected.values)
    active = expected.values > 0
    assert torch.equal(indices[active], expected.indices[active])


@pytest.mark.parametrize("backend", BACKENDS)
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
def test_selection_equals_the_reference_bit_by_bit(batch, n_latents, d_model, k, backend):
    g = torch.Generator().manual_seed(batch)
    x, W_enc = torch.randn(batch, d_model, generator=g), torch.randn(d_model, n_latents, generator=g)
    b_enc, b_dec = torch.randn(n_latents, generator=g), torch.randn(d_model, generator=g)
    assert_selects_as_the_reference(x, W_enc, b_enc, b_dec, k, backend)
    assert_selects_as_the_reference(x.t().contiguous().t().bfloat16(), W_enc, b_enc, b_dec, k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3, 32, 500])
def test_equal_values_and_values_one_ulp_apart_are_ordered(k, backend):
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
    assert_selects_as_the_reference(x, W_enc, b_enc, torch.zeros(d_model), k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("descending", [False, True])
def test_ascending_and_descending_values_are_selected(descending, backend):
    """Ascending z replaces the best k at every latent, which fills the candidates again and again."""
    n_latents = 3000
    b_enc = torch.arange(1, n_latents + 1).float().sort(descending=descending).values
    zeros = torch.zeros(8)
    assert_selects_as_the_reference(torch.zeros(3, 8), torch.zeros(8, n_latents), b_enc, zeros, 40, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_selected_where_nothing_is_positive(backend):
    values, _ = sae_of(torch.zeros(8, 100), torch.full((100,), -1.0), torch.zeros(8), 5, backend=backend).encode(
        torch.ones(3, 8)
    )
    assert torch.equal(values, torch.zeros(3, 5))
    values, _ = sae_of(torch.zeros(8, 100), torch.zeros(100), torch.zeros(8), 5, backend=backend).encode(
        torch.ones(3, 8)
    )
    assert torch.equal(values, torch.zeros(3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_selected_and_infinity_is_the_largest(backend):
    b_enc = torch.tensor([1.0, float("nan"), float("inf"), 2.0, float("inf")])
    values, indices = sae_of(torch.zeros(4, 5), b_enc, torch.zeros(4), 4, backend=backend).encode(torch.ones(1, 4))
    assert indices.tolist() == [[2, 4, 3, 0]]
    assert values.tolist() == [[float("inf"), float("inf"), 2.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dead", [10, 900])  # AuxK dense, AuxK sparse
def test_any_number_of_threads_gives_the_same_step_bitwise(dead, backend):
    g = torch.Generator().manual_seed(0)
    threads, states = torch.get_num_threads(), []
    W_enc, x = torch.randn(24, 1000, generator=g), torch.randn(700, 24, generator=g)
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        sae = sae_of(W_enc, torch.zeros(1000), torch.zeros(24), 8, k_aux=16, aux_coefficient=0.1, backend=backend)
        sae.tokens_since_fired[:dead] = 1000
        for _ in range(2):
            sae.step(x, lr=1e-2, variance=1.0)
        states.append(sae.state_dict())
    torch.set_num_threads(threads)
    for other in states[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, states[0][name]), name


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


@pytest.mark.parametrize("lack", ["compiler", "processor", "working compiler"])
def test_without_its_toolchain_one_warning_says_why_and_torch_takes_over(lack, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("SAE_KERNELS_CACHE", str(tmp_path))
    match lack:
        case "compiler":
            monkeypatch.setenv("CXX", "no-such-compiler")
        case "processor":
            monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2"}))
        case "working compiler":
            monkeypatch.setenv("CXX", "false")
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
        assert {"compiler": "no C++ compiler", "processor": "avx512_bf16", "working compiler": "failed"}[
            lack
        ] in caplog.text
    finally:
        build.library.cache_clear()


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path):
    program = "from sae_kernels.cpu.build import library, NEEDED, cpu_flags; assert library() or NEEDED - cpu_flags()"
    environment = os.environ | {"SAE_KERNELS_CACHE": str(tmp_path), "PYTHONPATH": str(Path(build.__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("*.so"))) == (1 if BACKENDS else 0)
