"""Steps of a dictionary on one rank or on a mesh, with all that the tests compare; also what a rank's process runs.

Cases of the Triton kernels run on the GPU of a rank's number, over nccl, where there are enough; else on CPU tensors,
interpreted.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from sae_kernels.reference import StepStatistics, unit_norm
from sae_kernels.shard import Backend, Shard

from sae_dist.sae.blocks import Blocks
from sae_dist.sae.config import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    JumpReLUTanh,
    Matryoshka,
    MatryoshkaTopK,
    MultiTopK,
    PAnneal,
    ReLU,
    ReLUNorm,
    SAEConfig,
    TopK,
)
from sae_dist.sae.variants.interface import spec_of
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel import step as steps
from sae_dist.train.parallel.mesh import Mesh, connect
from sae_dist.train.parallel.skip import Skip
from sae_dist.train.parallel.step import MeshStep


@dataclass(frozen=True)
class Case:
    """One dictionary on data of its own."""

    n_latents: int = 97  # divides over none of 2, 3, 4 ranks
    d_model: int = 16
    d_out: int | None = None  # of a transcoder, which rebuilds something else than its input
    k: int = 4
    k_aux: int = 8
    dead_after_tokens: int = 700
    batch: int = 46
    steps: int = 30
    lr: float = 1e-3
    data: str = "sparse"
    micro_batch: int | None = None
    clip_norm: float | None = None
    two_rounds: bool | None = None
    kind: type[SAEConfig] = TopK
    options: Mapping[str, Any] = field(default_factory=dict)  # of the kind
    width: int | None = None  # BatchTopK: candidates of a row and part
    product_dtype: torch.dtype = torch.float32
    backend: Backend = "auto"
    variance: float = 3.0
    sites: int = 1  # hook points that are rebuilt side by side
    blocks: Blocks | None = None  # of a cross-layer dictionary
    skip: bool = False  # a linear map from x to the target, beside the latents

    @property
    def sae(self) -> SAEConfig:
        return self.kind(n_latents=self.n_latents, k=self.k, k_aux=self.k_aux, **self.options)


TRITON = Case(  # the interpreter is slow
    n_latents=14, d_model=8, k=2, k_aux=3, batch=4, steps=2, dead_after_tokens=4, product_dtype=torch.bfloat16,
    backend="triton",
)  # fmt: skip
# Whole numbers and powers of 2, of which fp32 makes no sum inexact: gradients can be held against fp64 to the last bit.
EXACT = Case(
    n_latents=24, k=4, steps=1, data="integers", d_out=12, k_aux=4, dead_after_tokens=1, batch=32, variance=4.0
)  # fmt: skip
NESTED = {"prefixes": (0.125, 0.25, 0.5, 1.0)}
EXACT_KINDS = {  # their constants are powers of 2, too
    "matryoshka": replace(EXACT, kind=Matryoshka, options=NESTED, width=3),
    "matryoshka_topk": replace(EXACT, kind=MatryoshkaTopK, options=NESTED),
    "multi_topk": replace(EXACT, kind=MultiTopK, options={"wide_k": 9, "wide_weight": 0.25}),
    "abs_topk": replace(EXACT, kind=AbsTopK),
    "relu": replace(EXACT, kind=ReLU, k=8, d_out=16, options={"l1_coefficient": 0.5}),
    "gated": replace(EXACT, kind=Gated, k=8, d_out=16, options={"l1_coefficient": 0.5}),
}
OTHER_KINDS = {
    "relu_norm": Case(kind=ReLUNorm, k=8, steps=3, options={"l1_coefficient": 0.5}),
    "jumprelu_tanh": Case(
        kind=JumpReLUTanh, k=8, steps=3, options={"tanh_coefficient": 0.5, "silence_coefficient": 0.25}
    ),
}
OTHER_KINDS |= {f"crosscoder_{name}": replace(case, sites=2) for name, case in OTHER_KINDS.items()}
OTHER_KINDS["p_anneal"] = Case(kind=PAnneal, k=8, steps=3, options={"l1_coefficient": 0.5, "p_end": 0.5})
CASES = (
    EXACT_KINDS
    | OTHER_KINDS
    | {
        "transcoder": EXACT,
        "transcoder_batch": replace(EXACT, kind=BatchTopK, width=3),
        "transcoder_jump": replace(EXACT, kind=JumpReLU),
        "cross_layer": replace(EXACT, blocks=Blocks((8, 4, 4), (4, 4, 4), 24)),
        "cross_layer_batch": replace(EXACT, kind=BatchTopK, blocks=Blocks((8, 8), (6, 6), 24), skip=True),
        "cross_layer_long": Case(steps=12, dead_after_tokens=100, clip_norm=0.5, blocks=Blocks((8, 8), (8, 8), 97)),
        "skip": replace(EXACT, skip=True),
        "skip_nested": replace(EXACT_KINDS["matryoshka_topk"], skip=True),
        "skip_clipped": Case(steps=12, d_out=11, dead_after_tokens=100, clip_norm=0.5, skip=True),
        "transcoder_kernels": replace(EXACT, product_dtype=torch.bfloat16),
        "transcoder_long": Case(steps=12, d_out=11, dead_after_tokens=100, clip_norm=0.5),
        "long": Case(steps=200),
        "short": Case(steps=12, dead_after_tokens=100),
        "owned": Case(steps=12, data="owned"),
        "wide": Case(n_latents=30, k=20, steps=12, k_aux=0),
        "ties": Case(n_latents=24, k=5, steps=1, data="integers", k_aux=7, dead_after_tokens=1),
        "micro": Case(steps=12, dead_after_tokens=100, micro_batch=7),
        "clipped": Case(steps=12, dead_after_tokens=100, clip_norm=0.05),
        "kernels": Case(steps=12, dead_after_tokens=100, micro_batch=7, product_dtype=torch.bfloat16),
        "two_rounds": Case(steps=12, dead_after_tokens=100, two_rounds=True),
        "two_rounds_owned": Case(steps=12, data="owned", two_rounds=True),
        "two_rounds_one_row": Case(steps=3, batch=1, two_rounds=True),  # of several data ranks, some have none
        "two_rounds_ties": Case(
            n_latents=24, k=5, steps=1, data="integers", k_aux=7, dead_after_tokens=1, two_rounds=True
        ),
        "batch": Case(steps=12, dead_after_tokens=100, kind=BatchTopK),
        "batch_long": Case(steps=60, kind=BatchTopK),
        "batch_owned": Case(steps=12, data="owned", kind=BatchTopK),
        "batch_row": Case(steps=12, data="one row", kind=BatchTopK, width=2),
        "batch_few": Case(steps=12, data="few", kind=BatchTopK),
        "batch_ties": Case(
            n_latents=24, k=5, steps=1, data="integers", k_aux=7, dead_after_tokens=1, kind=BatchTopK, width=3
        ),
        "batch_micro": Case(steps=12, dead_after_tokens=100, kind=BatchTopK, micro_batch=7, clip_norm=0.05, width=1),
        "batch_kernels": Case(steps=12, dead_after_tokens=100, kind=BatchTopK, product_dtype=torch.bfloat16),
        "jump": Case(steps=12, dead_after_tokens=100, kind=JumpReLU),
        "jump_micro": Case(steps=12, dead_after_tokens=100, kind=JumpReLU, micro_batch=7, clip_norm=0.05, width=2),
        "jump_kernels": Case(steps=12, dead_after_tokens=100, kind=JumpReLU, product_dtype=torch.bfloat16),
        "triton": TRITON,
        "triton_uneven": replace(
            TRITON, n_latents=67, d_model=16, k=4, batch=11, steps=3, dead_after_tokens=22, two_rounds=True
        ),
        "triton_clipped": replace(TRITON, n_latents=64, d_model=16, clip_norm=0.05, micro_batch=5),
        "triton_batch": replace(TRITON, kind=BatchTopK, width=2),
    }
)


def parameters(case: Case) -> dict[str, torch.Tensor]:
    """Before the first step; of a cross-layer dictionary, 0 outside of its blocks."""
    given = _dense_parameters(case)
    if case.blocks is not None:
        latents = torch.arange(case.n_latents)
        given["W_enc"] = case.blocks.enc_(given["W_enc"].t().clone(), latents).t()
        given["W_dec"] = case.blocks.dec_(given["W_dec"], latents)
        if case.data != "integers":
            given["W_dec"] = unit_norm(given["W_dec"])
    return given


def _dense_parameters(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    W_dec = unit_norm(torch.randn(case.n_latents, case.d_model, generator=generator))
    b_enc = 0.05 * torch.randn(case.n_latents, generator=generator)
    W_enc = W_dec + 0.1 * torch.randn(case.n_latents, case.d_model, generator=generator)
    if case.data == "owned":
        b_enc[: case.k + 1] += 20  # the first part has all the best
    if case.data == "few":
        b_enc -= 2.5
    if case.data == "integers":  # every sum is exact: equal latents tie whoever computes them
        W_enc = torch.randint(-2, 3, (case.n_latents // 4, case.d_model), generator=generator).float().repeat(4, 1)
        b_enc = torch.ones(case.n_latents)
    given = {"W_enc": W_enc.t(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": torch.zeros(case.d_model)}
    if case.d_out is None:
        return given
    W_dec = unit_norm(torch.randn(case.n_latents, case.d_out, generator=generator))
    if case.data == "integers":
        W_enc, W_dec = (
            torch.randint(-1, 2, (case.n_latents, d), generator=generator).float() for d in (case.d_model, case.d_out)
        )
        given["W_enc"] = W_enc.t()
    given |= {"W_dec": W_dec, "b_dec": torch.ones(case.d_out), "b_in": -torch.ones(case.d_model)}
    if case.skip:
        given["W_skip"] = torch.randint(-1, 2, (case.d_model, case.d_out), generator=generator).float()
    return given


def vectors(case: Case) -> dict[str, torch.Tensor]:
    """The latents' own vectors."""
    if case.kind is Gated:
        return {"threshold": torch.arange(case.n_latents) % 3 - 0.5, "log_gain": torch.zeros(case.n_latents)}
    if case.kind not in (JumpReLU, JumpReLUTanh):
        return {}
    if case.data == "integers":
        return {"threshold": torch.arange(case.n_latents) % 5 / 2 + 0.25}
    return {"threshold": torch.linspace(0.5, 1.5, case.n_latents)}


def batch_of(case: Case, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    if case.data == "integers" and case.d_out is not None:
        return torch.randint(-1, 2, (case.batch, case.d_model), generator=generator).float()
    if case.data == "integers" and case.kind is BatchTopK:
        x = torch.randint(-2, 3, (case.batch, case.d_model), generator=generator).float()
        return torch.cat([x[: case.batch // 2], x[: case.batch - case.batch // 2]])  # rows tie too, across data ranks
    if case.data == "integers":
        return torch.randint(-2, 3, (case.batch, case.d_model), generator=generator).float()
    directions = torch.randn(40, case.d_model, generator=torch.Generator().manual_seed(7))
    strength = torch.rand(case.batch, 40, generator=generator) * (torch.rand(case.batch, 40, generator=generator) < 0.1)
    x = 0.5 + strength @ directions + 0.05 * torch.randn(case.batch, case.d_model, generator=generator)
    if case.data == "one row":
        x[step % case.batch] *= 50  # nearly all of the batch's best
    return x


def target_of(case: Case, step: int) -> torch.Tensor | None:
    """What a transcoder is to rebuild of `batch_of`."""
    if case.d_out is None:
        return None
    generator = torch.Generator().manual_seed(2000 + step)
    if case.data == "integers":
        return torch.randint(-3, 4, (case.batch, case.d_out), generator=generator).float()
    mixed = torch.randn(case.d_model, case.d_out, generator=torch.Generator().manual_seed(8))
    return batch_of(case, step) @ mixed - 2


def gradients(step: MeshStep) -> dict[str, torch.Tensor]:
    """Those of the last forward pass, of this rank's part."""
    enc, dec, b_enc, through = step.row_gradients()
    return {"W_enc": enc.t(), "W_dec": dec, "b_enc": b_enc, "b_dec": step._d_b_dec(through), **step._d_own} | (
        {} if step._d_skip is None else {"W_skip": step._d_skip}
    )


def one_step(
    step: MeshStep, x: torch.Tensor, target: torch.Tensor | None = None, *, lr: float, variance: float,
    seen: Callable[[MeshStep], None] = lambda _: None,
) -> StepStatistics:  # fmt: skip
    """A step on the whole batch; nothing changes at all where its figures are not sound. `seen` comes first."""
    statistics = step.forward(x, target, variance=variance, progress=1.0)
    seen(step)
    if step.gradients_are_finite(statistics):
        step.update_(lr=lr)
        step.count_(statistics.fired, tokens=len(x))
    else:
        step.skip_()
    return statistics


def train(case: Case, mesh: Mesh) -> dict[str, object]:
    """All steps on this rank: its part of the state, and of every step the selected (use, row, latent) and figures."""
    latents = mesh.latents(case.n_latents)
    whole = {name: tensor.to(mesh.device) for name, tensor in parameters(case).items()}
    shard = Shard(
        whole["W_enc"][:, latents.start : latents.stop], whole["W_dec"][latents.start : latents.stop],
        b_enc=whole["b_enc"][latents.start : latents.stop], b_dec=whole["b_dec"], b_in=whole.get("b_in"),
        k=min(case.k, len(latents)),
        k_aux=case.k_aux, aux_coefficient=1 / 32, dead_after_tokens=case.dead_after_tokens,
        vectors={name: vector[latents.start : latents.stop] for name, vector in vectors(case).items()},
        unit=spec_of(case.sae, "W_dec").unit, product_dtype=case.product_dtype, backend=case.backend,
    )  # fmt: skip
    step = MeshStep(
        shard, mesh, sae=case.sae, k_aux=case.k_aux,
        micro_batch=case.micro_batch, clip_norm=case.clip_norm, two_rounds=case.two_rounds, width=case.width,
        sites=case.sites, skip=Skip(whole["W_skip"], centre=whole["b_in"]) if case.skip else None,
        blocks=case.blocks,
    )  # fmt: skip
    if case.data == "integers":
        shard.tokens_since_fired[::2] = 10
    chosen, figures, in_lines = [], [], []
    save_terms, save_lines = shard.stages.save_for_backward_, steps.save_for_backward_
    found: dict[str, torch.Tensor] = {}

    def watch_terms(rows, terms, linear=None):
        owner = torch.arange(len(rows), device=rows.device)
        if in_lines and in_lines[-1] is not None:
            owner = in_lines[-1].extended(torch.arange(in_lines[-1].rows, device=rows.device))
        for number, term in enumerate(terms):
            line, place = term.selected.there.nonzero(as_tuple=True)
            of_step, of_term = torch.full_like(line, len(figures)), torch.full_like(line, number)
            latent = term.selected.indices[line, place] + latents.start
            chosen.append(torch.stack([of_step, of_term, owner[line], latent], 1))
        save_terms(rows, terms, linear)

    def watch_lines(stages, rows, terms, linear):
        in_lines.append(terms[0].lines)
        save_lines(stages, rows, terms, linear)

    def keep(step):
        if not found and not step._fused:
            found.update(gradients(step))

    shard.stages.save_for_backward_ = watch_terms  # type: ignore[method-assign]
    with patch.object(steps, "save_for_backward_", watch_lines):
        for number in range(case.steps):
            x, target = batch_of(case, number).to(mesh.device), target_of(case, number)
            s = one_step(step, x, target, lr=case.lr, variance=case.variance, seen=keep)
            figures.append([float(s.squared_error), float(s.aux_squared_error), int(s.active), step.dead_fraction()])
    state = {name: tensor.cpu().clone() for name, tensor in step.state_dict().items()}
    moved = {name: [m.calls, m.bytes, m.seconds] for name, m in mesh.traffic.items()}
    said = {"state": state, "figures": torch.tensor(figures, dtype=torch.float64), "moved": moved}
    return said | {"chosen": torch.cat(chosen).cpu(), "widened": step.widened, "gradients": found}


def device_of(rank: int, world: int, cases: list[str]) -> torch.device:
    """A GPU each for the Triton kernels, where there are as many as ranks."""
    native = torch.cuda.device_count() >= world and all(CASES[name].backend == "triton" for name in cases)
    return torch.device("cuda", rank) if native else torch.device("cpu")


def main(rank: int, data: int, feature: int, folder: Path, cases: list[str]) -> None:
    """One rank: trains every case and leaves folder/CASE.RANK.pt."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    config, world = MeshConfig(data=data, feature=feature, collective_timeout_s=120), data * feature
    store, device = dist.FileStore(f"{folder}/rendezvous", world), device_of(rank, world, cases)
    mesh, interpreted = connect(config, rank=rank, world=world, device=device, store=store), nullcontext()
    if any(CASES[name].backend == "triton" for name in cases) and device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.sae_kernels.interpreted import bf16_as_on_a_gpu  # Triton, which is to see that

        interpreted = bf16_as_on_a_gpu()
    with interpreted:
        for name in cases:
            torch.save(train(CASES[name], mesh), folder / f"{name}.{rank}.pt")
    mesh.close()
