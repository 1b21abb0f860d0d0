"""The list of configurations, which the compiler is asked about, against what the host code launches."""

from pathlib import Path

import pytest
import torch
from sae_kernels import triton_active, triton_latents, triton_select
from sae_kernels.shard import Shard
from sae_kernels.triton_compiled import TARGETS, row_of
from sae_kernels.triton_configurations import configurations
from sae_kernels.triton_topk_encode import encode_select

README = Path(__file__).parents[2] / "kernels/README.md"
BY_DEVICE = {"CAPACITY", "BULK", "RESIDENT", "ROWS", "LATENTS", "DEPTH", "FRAGMENTS", "LANES", "GROUP"}  # of `encode`
GATHERED = ("x_ptr", "W_ptr", "rows_ptr")  # pointers to what comes in more than one type
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def launch(name, constants, types, warps):
    """What makes two launches of a kernel the same; the interpreter has an encoder tile of its own."""
    dropped = BY_DEVICE if name == "_encode_kernel" else {"CAPACITY"} if name == "_rank_kernel" else set()
    kept = frozenset((key, value) for key, value in constants.items() if key not in dropped)
    read = tuple(types[pointer] for pointer in GATHERED if pointer in types)
    return name, kept, read, None if name == "_encode_kernel" else warps


@pytest.fixture(scope="module")
def listed():
    return {
        launch(one.kernel.__name__, one.constants, {n: t.replace("tensordesc<", "*")[:5] for n, t in one.types.items()},
               one.options["num_warps"])
        for target in TARGETS for one in configurations(target)
    }  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """Every launch that happens, and goes on as it would."""
    seen, kind = set(), type(triton_select._tighten_kernel)
    run = kind.run

    def noted(self, *given, grid, warmup, **options):
        named = dict(zip(self.arg_names, given, strict=False)) | options
        constants = {name: value for name, value in options.items() if name in self.arg_names}
        types = {name: TYPES[getattr(named[name], "base", named[name]).dtype] for name in GATHERED if name in named}
        seen.add(launch(self.__name__, constants, types, options["num_warps"]))
        return run(self, *given, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(kind, "run", noted)
    return seen


def dictionary(n_latents, d_model, device):
    g = torch.Generator().manual_seed(d_model)
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, d_model, generator=g))
    return [t.to(device) for t in (W_dec.t().contiguous(), W_dec, torch.zeros(n_latents), torch.zeros(d_model))]


@pytest.mark.parametrize(
    "d_model", [3, 64, 1000, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 16, 100, 256, 8192))]
)
def test_a_step_launches_what_is_listed(device, launched, listed, d_model):
    W_enc, W_dec, b_enc, b_dec = dictionary(8, d_model, device)
    x = torch.randn(2, d_model, generator=torch.Generator().manual_seed(1)).to(device)
    step = Shard(
        W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, k=1, k_aux=1, aux_coefficient=0.1, dead_after_tokens=10,
        backend="triton",
    )  # fmt: skip
    step.step(x, lr=1e-3, variance=1.0)
    step.tokens_since_fired.fill_(100)
    step.step(x, lr=1e-3, variance=1.0)  # dead latents, by dense products
    gradients, _ = step.gradients(x, variance=1.0)
    step.update_(gradients, lr=1e-3)  # clipped or summed over ranks in between
    assert launched <= listed, launched - listed
    assert {name for name, *_ in launched} >= {"_encode_kernel", "_decode_kernel", "_update_kernel"}


@pytest.mark.parametrize("d_model", [12, 32, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thresholds_and_their_gradients_launch_what_is_listed(device, launched, listed, d_model, dtype):
    W_enc, W_dec, b_enc, b_dec = (t.requires_grad_() for t in dictionary(20, d_model, device))
    theta = torch.full((20,), 0.5, device=device)
    x = torch.randn(3, d_model, generator=torch.Generator().manual_seed(1)).to(device)
    active = triton_active.threshold_encode(x, W_enc, b_enc, b_dec, theta=theta, product_dtype=dtype)
    x_hat = triton_active.active_decode(active, W_dec.to(dtype), b_dec)
    (x - x_hat).square().sum().backward()
    assert launched <= listed, launched - listed
    assert {name for name, *_ in launched} >= {"_encode_kernel", "_gather_dot_kernel", "_gradient_kernel"}


@pytest.mark.parametrize("k", [1, 2, 3, 7, 12, 30, 60, 120, 200, 500, 1000, 2048])
def test_selections_of_every_size_launch_what_is_listed(device, launched, listed, k):
    x, W = torch.ones(1, 16, device=device), torch.ones(40, 16, device=device)
    encode_select(x, W, torch.zeros(40, device=device), k=k)
    assert launched <= listed, launched - listed


def test_updates_of_every_width_are_listed(listed):
    depths = {dict(constants)["DEPTH"] for name, constants, *_ in listed if name == "_update_kernel"}
    assert depths == {triton_latents.power_of_two(d_model) for d_model in range(1, 8193)}


def test_names_are_unique_and_the_table_has_a_row_for_each_shape():
    rows = []
    for target in TARGETS:
        names = [one.name for one in configurations(target)]
        assert len(set(names)) == len(names)
        rows += map(row_of, names)
    table = README.read_text().split("### Compiled")[1].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table if "| `" in line] == list(dict.fromkeys(rows))
