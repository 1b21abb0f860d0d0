"""A harvest to try things on: a language model that is known, and every row of a store that it filled looked at."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_dist import storage
from sae_dist.config import load as load_config
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.units import sequences_of
from sae_dist.model import tiny
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import LanguageModel, load
from sae_dist.shards import gc, stores, verify
from sae_dist.shards.reader import Store, unit_rows
from sae_dist.text.stream import TokenStream
from sae_dist.text.tokenize import TokenSplit
from tests.harvest.one_unit import harvest
from tests.shards import predictable

HOOKS = ("resid_pre.0", "mlp_act.1", "resid_post.2")  # the second is split over the processes of a replica
SETTINGS = {"context": 32, "unit_sequences": 8, "heldout_tokens": 512, "dtype": "float32", "slice_rows": 64}
WITHIN = 1e-5  # of the row's norm, fp32: sums of two halves round otherwise than one sum


def embedding(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """What the predictable model has at resid_pre.0: integers, a function of the token."""
    return predictable.activation(tokens.numpy(), torch.zeros_like(tokens).numpy(), layer=0, width=width)


def predictable_model(folder: Path, special: dict[int, float] | None = None) -> Path:
    """A Llama in `folder` whose embedding is known; the tokens of `special` have one entry of that value in it."""
    model = tiny.model("tiny-llama")
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(embedding(torch.arange(len(weight)), weight.shape[1]))  # pyright: ignore[reportCallIssue]
        for token, value in (special or {}).items():
            weight[token, 3] = value
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def overrides(
    model: Path, store: str, out: Path, *more: str, tokens: int = 5120, hooks: Sequence[str] = HOOKS
) -> list[str]:
    """The harvest command on it, `tokens` / 256 training units and two held out."""
    settings = [f"harvest.{key}={value}" for key, value in SETTINGS.items()]
    return [
        "harvest", f"model={model}", "model.dtype=float32", "text=sample", f"hook=[{','.join(hooks)}]",
        f"store={store}", f"out={out}", f"harvest.tokens={tokens}", *settings, "wandb.mode=disabled", *more,
    ]  # fmt: skip


def split_of(out: Path) -> TokenSplit:
    """The tokens that the harvest into `out` took."""
    (folder,) = [path for path in (out / "text").iterdir() if not path.name.startswith(".")]
    return TokenSplit(TokenStream(folder / "train"), TokenStream(folder / "heldout"))


def check_every_row(store: Store, model: Path, out: Path, *, tokens: int = 5120) -> None:
    """All units are there, once, each row as this process works it out, to 1e-5; nothing else is there."""
    config = load_config(HarvestConfig, SETTINGS | {"tokens": tokens})
    language_model, split = load(ModelConfig(name=str(model), dtype="float32")), split_of(out)
    assert sorted(store.committed()) == list(range(store.meta.n_units))
    assert verify.verify(store).bad == []
    for unit in range(store.meta.n_units):
        _check_unit(store, unit, language_model, split, config)
    orphans = gc.collect(store, age_s=0, delete=True, now=2e12).orphans
    named = {shard.key for commit in store.committed().values() for shard in commit.shards.values()}
    assert {entry.key for entry in store.storage.list("data/")} == named, f"beside {len(orphans)} orphans"


def _check_unit(
    store: Store, unit: int, language_model: LanguageModel, split: TokenSplit, config: HarvestConfig
) -> None:
    work = sequences_of(unit, config)
    sequences = (split.heldout if work.heldout else split.train).sequences(work.sequences)
    expected = harvest(language_model, HOOKS, sequences=sequences, config=config)
    keys = list(zip(expected.doc.tolist(), expected.pos.tolist(), strict=True))
    for hook in HOOKS:
        found, places = {}, Counter()
        for part in unit_rows(store, hook, unit, 64):
            for i, key in enumerate(zip(part.doc.tolist(), part.pos.tolist(), strict=True)):
                places[key] += 1
                found[key] = part.x[i].clone()
                if hook == "resid_pre.0":
                    token = torch.tensor([int(part.token[i])])
                    assert torch.equal(part.x[i], embedding(token, part.x.shape[1])[0])
        assert places == Counter(keys), f"unit {unit} lost or doubled a row"
        for i, key in enumerate(keys):
            row = expected.states[hook][i]
            assert (found[key] - row).norm() <= WITHIN * row.norm(), f"unit {unit}, row {key}"


def opened(store: str) -> Store:
    return stores.open(storage.open(store))
