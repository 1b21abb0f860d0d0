"""One contender of benchmarks/harvest.py in its own process: `harvest_worker.py NAME JSON`; its result is one line.

It imports nothing of ours unless it measures us: peers run it in their own environments.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def forward(given: dict[str, Any]) -> dict[str, Any]:
    """Plain forward passes of the same layers against harvesting with writing, a unit each in turn."""
    engine, rows = _engine(given), _rows(given)
    sizes = {batch: _plain_rate(engine, given, rows[:32], batch) for batch in (4, 8, 16, 32)}
    best = max(sizes, key=lambda batch: sizes[batch])
    body = _body(engine, given)
    pairs = []
    with tempfile.TemporaryDirectory() as folder, _harvester(engine, given, folder, ["resid_post"]) as at_work:
        at_work.harvest(0)
        for i in range(1, given["rounds"] + 1):
            order = ("plain", "ours") if i % 2 else ("ours", "plain")
            seconds = {}
            for which in order:
                began = time.perf_counter()
                if which == "ours":
                    report = at_work.harvest(i)
                else:
                    _plain(body, rows[(i * 64) % len(rows) :][:64], best)
                seconds[which] = time.perf_counter() - began
            pairs.append(seconds | {"report": report._asdict()})
    positions = 64 * rows.shape[1]
    plain = statistics.median(p["plain"] for p in pairs)
    ours = statistics.median(p["ours"] for p in pairs)
    return {
        "plain_tokens_per_second": round(positions / plain, 1),
        "harvest_tokens_per_second": round(positions / ours, 1),
        "share": round(statistics.median(p["plain"] / p["ours"] for p in pairs), 3),
        "plain_batch": best,
        "plain_by_batch": {str(batch): round(rate, 1) for batch, rate in sizes.items()},
        "flop_per_token": engine.flop_per_token([f"resid_post.{given['layer']}"], rows.shape[1]),
        "pairs": pairs,
    }


def hooks(given: dict[str, Any]) -> dict[str, Any]:
    """Three hook points in one pass against one of them, the last."""
    engine = _engine(given)
    pairs = []
    with (
        tempfile.TemporaryDirectory() as a,
        tempfile.TemporaryDirectory() as b,
        _harvester(engine, given, a, ["resid_post"]) as one,
        _harvester(engine, given, b, ["resid_post", "resid_post-3", "resid_post-6"]) as three,
    ):
        one.harvest(0)
        three.harvest(0)
        for i in range(1, given["rounds"] + 1):
            seconds = {}
            for name, at_work in (("one", one), ("three", three)) if i % 2 else (("three", three), ("one", one)):
                began = time.perf_counter()
                at_work.harvest(i)
                seconds[name] = time.perf_counter() - began
            pairs.append(seconds)
    return {"slower": round(statistics.median(p["three"] / p["one"] for p in pairs) - 1, 3), "pairs": pairs}


def ours(given: dict[str, Any]) -> dict[str, Any]:
    engine = _engine(given)
    with tempfile.TemporaryDirectory() as folder, _harvester(engine, given, folder, ["resid_post"]) as at_work:
        at_work.harvest(0)
        began = time.perf_counter()
        reports = [at_work.harvest(i) for i in range(1, given["rounds"] + 1)]
        seconds = time.perf_counter() - began
    return {"tokens_per_second": sum(r.positions for r in reports if r) / seconds, "writes": True}


def sae_lens(given: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    rows = _rows(given)[: given["rounds"] * 64]
    with tempfile.TemporaryDirectory() as folder:
        runner = CacheActivationsRunner(
            CacheActivationsRunnerConfig(
                dataset_path="in memory",
                model_name=given["model"],
                model_class_name="AutoModelForCausalLM",
                model_from_pretrained_kwargs={"dtype": torch.float32},
                model_batch_size=16,
                hook_name=f"model.layers.{given['layer']}",
                d_in=576,
                training_tokens=rows.numel(),
                context_size=rows.shape[1],
                buffer_size_gb=0.019,  # a shard of 64 sequences, as ours
                new_cached_activations_path=f"{folder}/activations",
                shuffle=False,
                streaming=False,
                prepend_bos=False,
                device="cpu",
            ),
            override_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        )
        began = time.perf_counter()
        written = runner.run()
        seconds = time.perf_counter() - began
        return {"tokens_per_second": len(written) * rows.shape[1] / seconds, "writes": True}


def sparsify(given: dict[str, Any]) -> dict[str, Any]:
    """Its trainer, whose forward passes are its harvesting; a step's time runs from one forward pass to the next."""
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer
    from transformers import AutoModel

    rows = _rows(given)[: (given["rounds"] + 1) * 64]
    model = AutoModel.from_pretrained(given["model"], dtype=torch.float32)
    begun: list[float] = []
    model.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    data = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=64, k=4), batch_size=16, layers=[given["layer"]], log_to_wandb=False,
            save_dir=folder, save_every=10**9,
        )  # fmt: skip
        Trainer(config, data, model).fit()
    steps = np.diff(begun)[2:]
    return {"tokens_per_second": 16 * rows.shape[1] / float(np.median(steps)), "writes": False}


def _rows(given: dict[str, Any]) -> torch.Tensor:
    return torch.as_tensor(np.load(Path(given["tokens"]) / "tokens.npy")).long()


def _engine(given: dict[str, Any]) -> Any:
    from sae_dist.model.config import ModelConfig
    from sae_dist.model.engine import open_engine

    torch.set_num_threads(given["threads"])
    return open_engine(ModelConfig(name="smollm2"))


def _body(engine: Any, given: dict[str, Any]) -> torch.nn.Module:
    """The decoder with the layers up to the last one needed; its weights are the engine's."""
    import copy

    body = copy.copy(engine.model.model)
    body._modules = dict(engine.model.model._modules)
    body.layers = engine.model.model.layers[: given["layer"] + 1]
    return body


@torch.no_grad()
def _plain(body: torch.nn.Module, rows: torch.Tensor, batch: int) -> None:
    for part in rows.split(batch):
        body(input_ids=part, use_cache=False)


def _plain_rate(engine: Any, given: dict[str, Any], rows: torch.Tensor, batch: int) -> float:
    body = _body(engine, given)
    _plain(body, rows[:batch], batch)
    began = time.perf_counter()
    _plain(body, rows, batch)
    return rows.numel() / (time.perf_counter() - began)


class _harvester:
    """A Harvester on a store in `folder`; hook points are named by their distance from the last layer."""

    def __init__(self, engine: Any, given: dict[str, Any], folder: str, kinds: list[str]) -> None:
        from sae_dist import storage
        from sae_dist.harvest.config import HarvestConfig
        from sae_dist.harvest.harvester import Harvester
        from sae_dist.shards.format import StoreMeta
        from sae_dist.shards.writer import create
        from sae_dist.text.stream import TokenStream
        from sae_dist.text.tokenize import TokenSplit

        names = []
        for kind in kinds:
            name, _, back = kind.partition("-")
            names.append(f"{name}.{given['layer'] - int(back or 0)}")
        stream = TokenStream(next((Path(given["tokens"]) / "text").glob("[0-9a-f]*/train")))
        units = len(stream.tokens) // stream.context // 64
        config = HarvestConfig(tokens=units * 64 * stream.context, heldout_tokens=1, context=stream.context)
        meta = StoreMeta(
            model="smollm2", hooks={name: engine.width(name) for name in names}, n_units=units, unit_rows=64 * 127
        )
        store = create(storage.open(folder), meta)
        self._at_work = Harvester(engine, store, names, split=TokenSplit(stream, stream), config=config)

    def __enter__(self) -> Any:
        return self._at_work

    def __exit__(self, *_: object) -> None:
        self._at_work.close()


CONTENDERS = {"forward": forward, "hooks": hooks, "ours": ours, "sae_lens": sae_lens, "sparsify": sparsify}

if __name__ == "__main__":
    result = CONTENDERS[sys.argv[1]](json.loads(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
