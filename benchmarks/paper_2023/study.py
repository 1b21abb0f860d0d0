"""The stages of the paper, each repeated from where it stopped: text, transformers, dictionaries, figures."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

import sae_dist
from benchmarks.paper import trained
from benchmarks.paper_2023 import corpus, language_model, measure, proxies
from benchmarks.paper_2023.measure import Found, Rowed, Text
from benchmarks.paper_2023.sizes import Size
from benchmarks.shuffled_model import shuffled_model
from sae_dist import storage
from sae_dist.model.config import ModelConfig
from sae_dist.sae import find
from sae_dist.shards import stores
from sae_dist.text.stream import TokenStream

logger = logging.getLogger("paper-2023")
HOOK = "mlp_act.0"
SUBJECTS = ("A", "B", "shuffled")
CATEGORIES = ("html", "python", "de", "fr")  # whose tokens tell them, beside alphabets and scripts
LEAST = 10  # rows on which a latent is active, to be counted
OWN = 0.5  # share of the activation of a latent in documents of a category, from which on it is one of its latents
SCRIPT_TOKENS = 2_000_000  # of the text, that tell which script a token is of
L1 = 3.0  # so that 10 to 20 latents are active on a token; the paper's 0.004 is in units of its own
Points = dict[str, dict[int, Path]]  # of a transformer: the dictionaries' folders, by recipe and width


def recipes(size: Size) -> dict[str, dict[str, Any]]:
    """The paper's own, with its schedule of resampling as shares of the steps, and one of today."""
    steps = size.train_tokens // size.batch
    return {
        "paper": {
            "sae": "relu", "sae.l1_coefficient": L1, "sae.k_aux": 0, "train.init_data_weight": 0.0,
            "train.resample_after": [max(steps * share // 40, 1) for share in (4, 8, 12, 16)],
        },
        "modern": {"sae": "batchtopk", "sae.k": 16, "sae.dead_after_tokens": size.train_tokens // 10},
    }  # fmt: skip


def prepare(out: Path, size: Size, text: Path | None) -> Path:
    """The text and the transformers; the text's place."""
    text = corpus.make(out) if text is None else text
    tokenizer, tokens = language_model.make_tokenizer(text, size.vocab, out / "tokenizer"), None
    for seed, name in enumerate("AB"):
        folder = out / "models" / name
        if not (folder / "training.json").exists():
            tokens = tokens or language_model.tokenise(text, tokenizer)
            found = language_model.train(tokens, size.vocab, size.lm_tokens, seed, folder)
            logger.info("transformer %s: %.3f nats a token on held-out text", name, found["heldout_loss"])
        tokenizer.save_pretrained(folder)
    shuffled_model(ModelConfig(name=str(out / "models/A")), out / "models/shuffled")
    return text


def dictionaries(out: Path, size: Size, text: Path, name: str) -> Points:
    """Those of a transformer: of A in every width."""
    folder, found = out / name, Points()
    for recipe, keys in recipes(size).items():
        widths = size.widths if name == "A" else (size.main,)
        asked = {
            "model": str(out / "models" / name), "hook": HOOK, "text": "jsonl", "text.path": str(text),
            "text.category": "category", "store": str(folder / "store"), "out": str(folder / recipe),
            "harvest.tokens": size.rows, "harvest.heldout_tokens": size.heldout, "harvest.rows.max_norm_ratio": None,
            "train.tokens": size.train_tokens, "train.batch": size.batch, "wandb.mode": "disabled", **keys,
        }  # fmt: skip
        points = trained(asked, {"sae.n_latents": widths})
        found[recipe] = {point["summary"]["n_latents"]: folder / recipe / "points" / point["id"] for point in points}
    return found


class Subject(NamedTuple):
    """A transformer's held-out rows, and what was trained on them."""

    rows: Rowed
    points: Points

    def dictionaries(self) -> dict[str, Any]:
        return {
            key(recipe, width): find.load(str(folder))
            for recipe, own in self.points.items()
            for width, folder in own.items()
        }


def key(recipe: str, width: int) -> str:
    return f"{recipe} {width}"


def subject(out: Path, name: str, points: Points) -> Subject:
    store = stores.open(storage.open(str(out / name / "store")))
    (stream, *_) = sorted((out / name).glob("**/text/*/heldout/stream.json"))
    return Subject(Rowed(store, TokenStream(stream.parent), HOOK), points)


def figures(out: Path, size: Size, points: Mapping[str, Points]) -> dict[str, Any]:
    """Every figure of the page; docs/papers.md says what each is."""
    subjects = {name: subject(out, name, own) for name, own in points.items()}
    a = subjects["A"]
    names, text = described(out, a.rows.stream)
    categories = sorted({each or "" for each in a.rows.stream.categories()})
    found = {name: measure.measure(own.dictionaries(), own.rows, text) for name, own in subjects.items()}
    return {
        "size": size._asdict(), "l1_coefficient": L1, "proxies": names,
        "transformers": {name: json.loads((out / "models" / name / "training.json").read_text()) for name in "AB"},
        "dictionaries": [
            about(name, recipe, width, folder, found[name][1][key(recipe, width)])
            for name, own in points.items() for recipe, widths in own.items() for width, folder in widths.items()
        ],
        "features": features(names, found, size),
        "splitting": splitting(found["A"][1], categories),
        "universality": universality(points, subjects, found, size, names),
        "automata": automata(a, found["A"][1], names, size),
    }  # fmt: skip


def described(out: Path, stream: TokenStream) -> tuple[list[str], Text]:
    """The proxies by name, and what they and the categories say of every place of the held-out text.

    What tells tokens of a kind is counted in that text itself.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    words, tokens = proxies.vocabulary(tokenizer), np.asarray(stream.tokens, np.int64)
    ends = np.minimum(np.asarray(stream.starts[1:]), len(tokens))
    documents = [tokens[first:last] for first, last in zip(stream.starts, ends, strict=False)]
    labels = [each or "" for each in stream.documents["category"].to_pylist()]
    log_p = proxies.log_frequency(documents, len(words))
    told = [some for some, end in zip(documents, ends, strict=True) if end <= SCRIPT_TOKENS]
    tables = {name: proxies.of_alphabet(letters, words, log_p) for name, letters in proxies.ALPHABETS.items()}
    tables |= proxies.of_scripts(told, words)
    tables |= proxies.of_categories(list(zip(labels, documents, strict=True)), CATEGORIES, len(words))
    begins = np.zeros(len(tokens), bool)
    begins[np.asarray(stream.starts[:-1])] = True
    shape = (-1, stream.context)
    each = [proxies.evidence(table, tokens.reshape(shape), begins.reshape(shape)).ravel() for table in tables.values()]
    known = sorted(set(labels))
    category = np.repeat([known.index(label) for label in labels], np.diff([*stream.starts[:-1], len(tokens)]))
    return list(tables), Text(np.stack(each, 1), category, len(known))


def about(name: str, recipe: str, width: int, folder: Path, found: Found) -> dict[str, Any]:
    judged = json.loads((folder / "summary.json").read_text())["eval"]
    kept = ("fvu", "l0", "loss_recovered", "loss_recovered_mean", "ce_clean", "ce_spliced", "ce_zero_ablated")
    return {
        "transformer": name, "recipe": recipe, "width": width, **{each: judged.get(each) for each in kept},
        "silent": float((found.firings == 0).double().mean()),
        "ultralow": float((found.firings < LEAST).double().mean()), "rows": found.rows,
    }  # fmt: skip


def features(names: list[str], found: Mapping[str, tuple[Found, dict[str, Found]]], size: Size) -> list[dict[str, Any]]:
    """For each proxy the best latent of each recipe at the main width, the best neuron, and those of controls."""
    lines = []
    for place, name in enumerate(names):
        line: dict[str, Any] = {"proxy": name, "neuron": found["A"][0].best(place)}
        for recipe in recipes(size):
            for subject, (_, own) in found.items():
                line[f"{recipe} {subject}"] = own[key(recipe, size.main)].best(place)
        lines.append(line)
    return lines


def splitting(found: Mapping[str, Found], categories: list[str]) -> dict[str, dict[str, int]]:
    """How many latents each dictionary has of each category: those with most of their activation there."""
    counts = {}
    for name, own in found.items():
        share = own.mass / own.mass.sum(1, keepdim=True).clamp(min=1e-30)
        chosen = share.ge(OWN) & own.firings.ge(LEAST)[:, None]
        counts[name] = dict(zip(categories, chosen.sum(0).tolist(), strict=True))
    return counts


def universality(
    points: Mapping[str, Points], subjects: Mapping[str, Subject],
    found: Mapping[str, tuple[Found, dict[str, Found]]], size: Size, names: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The correlation of latents of A with the nearest of B on the same tokens, and of neurons."""
    alike = measure.neurons_alike(subjects["A"].rows, subjects["B"].rows)
    result: dict[str, Any] = {"neurons": float(alike[alike > measure.NONE].median())}
    for recipe in recipes(size):
        both = sae_dist.compare(*(points[name][recipe][size.main] for name in "AB"), tokens=10 * size.heldout)
        own = both.figures["pairs"][0]["matches"][0]["correlation"]
        table = both.matches.to_pydict()
        r = {
            latent: r
            for of, latent, r in zip(*(table[c] for c in ("dictionary", "latent", "r")), strict=True)
            if of == "A"
        }
        latents = found["A"][1][key(recipe, size.main)]
        result[recipe] = {
            "median": own["found"]["quantiles"]["0.5"], "chance": own["chance"]["quantiles"]["0.5"],
            "histogram": own["found"]["histogram"], "of_chance": own["chance"]["histogram"],
            "best": {name: r[latents.best(place)[0]] for place, name in enumerate(names)},
        }  # fmt: skip
    return result


def automata(a: Subject, found: Mapping[str, Found], names: list[str], size: Size) -> list[dict[str, Any]]:
    """What follows what: of the strongest latents of each proxy, how often one is active after another."""
    own, dictionary = found[key("modern", size.main)], find.load(str(a.points["modern"][size.main]))
    chosen = {
        int(latent): name for place, name in enumerate(names) for latent in own.chosen_by[:, place].topk(2).indices
    }
    latents = list(chosen)
    after, alone = measure.transitions(dictionary, latents, a.rows)
    edges = []
    for i, j in torch.nonzero((after >= 0.5) & (after >= 4 * alone)).tolist():
        edges.append(
            {"from": latents[i], "of": chosen[latents[i]], "to": latents[j], "to_of": chosen[latents[j]],
             "share": float(after[i, j]), "alone": float(alone[j])}
        )  # fmt: skip
    return sorted(edges, key=lambda edge: -edge["share"])
