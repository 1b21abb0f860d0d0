"""One trainer's training steps on given activations, in its own environment: run by peers.py, prints one JSON line.

    python peer_step.py TRAINER MODE activations.npy n_latents k batch steps

Every trainer runs the loop of its own training code without its data loading, from the initialisation and the learning
rate that it chooses for this size. MODE `documented` is what its documentation gives on a CPU; `fast` adds what was
found to be fastest for each: bf16 autocast, on a processor that multiplies bf16 faster than fp32.
"""

import contextlib
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

Run = Callable[[Iterable[Tensor]], object]
Decode = Callable[[Tensor], Tensor]
D_MODEL = 576


def ours(n_latents: int, k: int, first: Tensor, _steps: int, fast: bool) -> tuple[Run, Decode]:
    from sae_kernels.plain import sparse_decode
    from sae_kernels.shard import Shard

    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, D_MODEL), dim=1)
    sae = Shard(
        W_dec.t() / 3**0.5, W_dec, b_enc=torch.zeros(n_latents), b_dec=first.mean(0), k=k, k_aux=256,
        aux_coefficient=1 / 32, dead_after_tokens=10_000_000, backend="auto" if fast else "torch",
    )  # fmt: skip
    # the best of 5e-4, 1e-3, 2e-3 and 4e-3 for ten steps; sparsify's own choice, for signs of gradients, is 5e-3
    lr, variance = 4e-3 / (n_latents / 2**14) ** 0.5, first.var(0).sum()

    def step(x: Tensor) -> None:
        sae.step(x, lr=lr, variance=variance)

    return _each(step), lambda x: sparse_decode(*sae.encode(x), sae.W_dec, sae.b_dec)


def sparsify(n_latents: int, k: int, first: Tensor, _steps: int, fast: bool) -> tuple[Run, Decode]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would choose Triton's decoder, which needs a GPU
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(D_MODEL, SparseCoderConfig(num_latents=n_latents, k=k))
    sae.b_dec.data = first.mean(0)
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (n_latents / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    silent = torch.zeros(n_latents, dtype=torch.long)

    def step(x: Tensor) -> None:
        with _autocast(fast):
            out = sae(x, dead_mask=silent > 10_000_000)
            (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    def decode(x: Tensor) -> Tensor:
        optimizer.eval()
        return sae(x).sae_out

    return _each(step), decode


def sae_lens(n_latents: int, k: int, first: Tensor, steps: int, fast: bool) -> tuple[Run, Decode]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=n_latents, k=k))
    sae.b_dec.data = first.mean(0)
    config = SAETrainerConfig(
        total_training_samples=steps * len(first),
        train_batch_size_samples=len(first),
        autocast=fast and _bf16_is_faster(),
        lr_end=3e-5,
    )
    trainer = SAETrainer(config, sae, iter(()))
    return _each(trainer.step), sae


def dictionary_learning(n_latents: int, k: int, _first: Tensor, steps: int, fast: bool) -> tuple[Run, Decode]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=steps, activation_dim=D_MODEL, dict_size=n_latents, k=k, layer=15, lm_name="smollm2",
        warmup_steps=min(10, steps - 1), device="cpu",
    )  # fmt: skip
    done = iter(range(10**9))

    def step(x: Tensor) -> None:
        with _autocast(fast):
            trainer.update(next(done), x)

    return _each(step), trainer.ae


def llamascopium(n_latents: int, k: int, first: Tensor, steps: int, fast: bool) -> tuple[Run, Decode]:
    import tempfile

    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    from llamascopium.trainer import Trainer, TrainerConfig

    hook = {"hook_point_in": "x", "hook_point_out": "x"}
    config = SAEConfig(
        **hook, d_model=D_MODEL, expansion_factor=n_latents / D_MODEL, act_fn="topk", top_k=k, device="cpu",
        dtype=torch.float32, norm_activation="inference", sparsity_include_decoder_norm=False,
    )  # fmt: skip
    sae = SparseAutoEncoder(config)
    with torch.no_grad():
        sae.W_D.copy_(torch.nn.functional.normalize(torch.randn_like(sae.W_D), dim=1))
        sae.W_E.copy_(sae.W_D.t())
        sae.b_E.zero_()
        sae.b_D.copy_(first.mean(0))
    trainer = Trainer(TrainerConfig(
        auxk_coefficient=1 / 32, initial_k=k, k_warmup_steps=0, l1_coefficient=None, k_aux=256,
        lr_warm_up_steps=1, lr_cool_down_steps=1,
        total_training_tokens=steps * len(first), n_checkpoints=0, exp_result_path=tempfile.mkdtemp(),
        amp_dtype=torch.bfloat16 if fast and _bf16_is_faster() else torch.float32, skip_metrics_calculation=fast,
    ))  # fmt: skip

    def run(batches: Iterable[Tensor]) -> None:
        ones = torch.ones(len(first))
        trainer.fit(sae, ({"x": x, "tokens": ones, "mask": ones} for x in batches))

    return run, sae


def _each(step: Callable[[Tensor], object]) -> Run:
    def run(batches: Iterable[Tensor]) -> None:
        for x in batches:
            step(x)

    return run


def _autocast(fast: bool) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16) if fast and _bf16_is_faster() else contextlib.nullcontext()


@functools.cache
def _bf16_is_faster() -> bool:
    def seconds(dtype: torch.dtype) -> float:
        a, b, times = torch.randn(512, D_MODEL).to(dtype), torch.randn(D_MODEL, 512).to(dtype), []
        for _ in range(3):
            began = time.process_time()
            torch.mm(a, b)
            times.append(time.process_time() - began)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def main() -> None:
    name, mode, path, *sizes = sys.argv[1:]
    n_latents, k, batch, steps = map(int, sizes)
    torch.manual_seed(0)
    rows = np.load(path, mmap_mode="r")
    held_out = torch.tensor(rows[-batch:]).float()

    def batches() -> Iterator[Tensor]:
        places = len(rows) // batch - 1
        for i in range(steps):
            start = i % places * batch
            yield torch.tensor(rows[start : start + batch]).float()

    run, decode = globals()[name](n_latents, k, next(batches()), steps, mode == "fast")
    seconds: list[float] = []
    processor_seconds: list[float] = []

    def timed() -> Iterator[Tensor]:
        for x in batches():
            began, processor_began = time.perf_counter(), time.process_time()
            yield x
            seconds.append(time.perf_counter() - began)
            processor_seconds.append(time.process_time() - processor_began)

    run(timed())
    with torch.no_grad():
        residual = held_out - decode(held_out)
    fvu = residual.square().sum() / (held_out - held_out.mean(0)).square().sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = {"seconds": seconds, "processor_seconds": processor_seconds}
    autocast = "bfloat16" if mode == "fast" and _bf16_is_faster() else None
    own = {"fvu": float(fvu), "peak_bytes": peak, "torch": torch.__version__, "autocast": autocast}
    print(json.dumps(times | own))


if __name__ == "__main__":
    main()
