"""A tiny model, dictionaries for it, and a run."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from sae_dist import storage
from sae_dist.cli.compose import compose
from sae_dist.config import load as load_config
from sae_dist.config import to_dict
from sae_dist.harvest.harvester import Harvester
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.service.config import RunConfig
from sae_dist.service.evaluate_job import pages
from sae_dist.service.prepare import prepare
from sae_dist.shards import stores

LANGUAGE_MODEL = load(ModelConfig(name="tiny-llama", dtype="float32", device="cpu"))
MODEL: Any = LANGUAGE_MODEL.model  # transformers types its methods too loosely
TOKENS = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))
N, D, K = 64, 32, 4


def random_dictionary(hook: str, target: str | None = None, *, d_in: int = D, variant: str = "topk") -> Dictionary:
    """Reads `hook` and rebuilds `target`, or what it reads; its decoder is not its encoder transposed."""
    g = torch.Generator().manual_seed(1)
    parameters = Parameters(
        torch.randn(d_in, N, generator=g), torch.randn(N, D, generator=g) / D**0.5,
        torch.randn(N, generator=g) / 10, torch.randn(D, generator=g) / 10,
    )  # fmt: skip
    info = {"variant": variant, "hook": hook, "model": "tiny-llama"} | ({"target_hook": target} if target else {})
    return Dictionary(parameters=parameters, k=K, info=info, b_in=torch.zeros(d_in) if target else None)


def dense(dictionary: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """All latents of x [..., d_in]."""
    active = dictionary.encode(x.flatten(0, -2))
    out = torch.zeros(x[..., 0].numel(), N)
    out[active.rows, active.indices] = active.values
    return out.view(*x.shape[:-1], N)


def small_run(out: Path) -> Path:
    """A run's folder with store, text, dictionary and feature pages, made in this process; the dictionary is random."""
    kinds = {"digits": "0123456789", "letters": "abcdefghij"}
    g = random.Random(0)
    lines = [
        json.dumps({"text": "".join(g.choices(signs, k=150)), "category": kind})
        for _ in range(60)
        for kind, signs in kinds.items()
    ]
    (out.parent / "text.jsonl").write_text("\n".join(lines))
    values = compose(
        "run",
        ["preset=tiny", f"text={out.parent}/text.jsonl",
         "text.category=category", f"out={out}", "hook=resid_post.1", "harvest.tokens=4096",
         "harvest.heldout_tokens=2048", "harvest.unit_sequences=8", "harvest.context=64", "model.dtype=float32",
         "order.round_units=0", "train.init_rows=64", "sae.n_latents=64", "sae.k=4", "pages.tokens=2000"],
    )  # fmt: skip
    config = load_config(RunConfig, values)
    prepared = prepare(
        model=config.model, hook_points=[config.hook], text=config.text, harvest=config.harvest, folder=out / "text",
        store_uri=config.store_uri, progress=lambda _: None,
    )  # fmt: skip
    store = stores.open(storage.open(config.store_uri))
    harvester = Harvester(LANGUAGE_MODEL, store, [config.hook], split=prepared.split, config=config.harvest)
    for unit in range(store.meta.n_units):
        harvester.harvest(unit)
    harvester.close()
    (out / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    dictionary_file.save(random_dictionary(config.hook), out / "dictionary")
    pages(config, LANGUAGE_MODEL, store=store, stream=prepared.split.train, summary={"name": "small"})
    return out
