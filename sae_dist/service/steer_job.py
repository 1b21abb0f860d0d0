"""Interventions on a run's model with its dictionary, in one process; repeated, it goes on where it was."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_dist import storage
from sae_dist.config import UserError, digest, to_dict
from sae_dist.config import load as load_config
from sae_dist.model.engine import describe
from sae_dist.model.load import LanguageModel
from sae_dist.model.load import load as load_model
from sae_dist.run_files import parse_json, write_json
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.dictionary import Dictionary
from sae_dist.service.config import RunConfig
from sae_dist.service.prepare import prepare
from sae_dist.service.run_folder import read_config
from sae_dist.shards import stores
from sae_dist.shards.reader import Store, heldout, unit_rows
from sae_dist.shards.retention import present_units
from sae_dist.steer import activity, study
from sae_dist.steer.attach import on_device, sites
from sae_dist.steer.config import CATEGORY, SteerConfig, as_list
from sae_dist.steer.contrast import AWAY, NEITHER, TOWARD, Batch, contrast, tell_apart
from sae_dist.steer.labels import labels
from sae_dist.steer.page import write_page
from sae_dist.steer.sample import prompt_tokens
from sae_dist.steer.study import Subject
from sae_dist.text.stream import TokenStream
from sae_dist.text.tokenize import separator
from sae_dist.train.members import MAIN, folder

logger = logging.getLogger(__name__)

_BATCH_ROWS = 4096


class SteeredRun:
    """A finished run with its model, store and text."""

    def __init__(self, out: Path, name: str) -> None:
        values = read_config(out) | {"out": str(out)}
        if "model" not in values:
            raise UserError(
                f"run={out} is a run of `sae-dist train`: it has no model to steer; give one of `sae-dist run`"
            )
        try:
            self.config = load_config(RunConfig, values)
        except UserError as wrong:
            raise UserError(f"{out / 'config.yaml'} is damaged: {wrong}") from None
        known = [member.name for member in self.config.members]
        if name not in known:
            raise UserError(f"dictionary={name} is not in run={out}; it has {', '.join(known)}")
        own = dictionary_file.load(folder(out, name))
        self.name = name
        self.store: Store = stores.open(storage.open(self.config.store_uri))
        self.model: LanguageModel = load_model(self.config.model)
        self.dictionary: Dictionary = on_device(own, self.model.device)
        self.hook = sites(own)[0]
        prepared = prepare(
            model=self.config.model, hook_points=self.config.hooks, text=self.config.text,
            harvest=self.config.harvest, folder=out / "text", store_uri=self.config.store_uri,
            progress=lambda _: None, describe_on_cluster=lambda: describe(self.model, self.config.hooks),
        )  # fmt: skip
        self.train: TokenStream = prepared.split.train
        self.heldout: TokenStream = prepared.split.heldout
        self.separator = separator(self.model.tokenizer)

    def encode(self, x: Tensor) -> Any:
        return self.dictionary.encode(x.to(self.model.device).float())

    def activity(self, out: Path) -> activity.Activity:
        """Of the feature pages, or, where there are none of this dictionary, measured on the held-out rows."""
        if self.name == MAIN and (out / "pages" / "index.html").is_file():
            return activity.of_pages(out / "pages")
        logger.info("no feature pages of dictionary=%s: its latents are measured on held-out rows", self.name)
        rows = (part.x for part in heldout(self.store, self.hook, _BATCH_ROWS))
        return activity.of_rows(rows, self.encode, n_latents=self.dictionary.n_latents, what="held-out rows")

    def sequences(self, n: int) -> Tensor:
        """Held-out sequences, evenly over the text."""
        return torch.as_tensor(self.heldout.sequences(self.heldout.spread(n)).tokens)

    def batches(self, config: SteerConfig) -> Iterator[Batch]:
        """Rows of `toward` and `away`: of example texts, and of the store by the category of their document."""
        sides = {TOWARD: as_list(config.toward), AWAY: as_list(config.away)}
        texts = {side: [text for text in own if not text.startswith(CATEGORY)] for side, own in sides.items()}
        number = 0
        for side, own in texts.items():
            for text in own:
                number += 1
                tokens = prompt_tokens(self.model, text, self.separator)
                x = self.model.capture(tokens[None, : self.train.context], [self.hook])[self.hook][0, 1:]
                yield x, x, torch.full((len(x),), -number), torch.full((len(x),), side)
        side_of = {c.removeprefix(CATEGORY): side for side, own in sides.items() for c in own if c.startswith(CATEGORY)}
        known = {name for name in self.train.categories() if name is not None}
        if unknown := sorted(side_of.keys() - known):
            raise UserError(
                f"{CATEGORY}{unknown[0]} is no category of the run's text; it has {', '.join(sorted(known)) or 'none'}"
            )
        others = NEITHER if config.away else AWAY
        if side_of or others == AWAY:
            yield from self._stored(config.tokens, side_of, others)

    def _stored(self, tokens: int, side_of: Mapping[str, int], others: int) -> Iterator[Batch]:
        of_doc: dict[int, int] = {}
        for unit in present_units(self.store):
            for part in unit_rows(self.store, self.hook, unit, _BATCH_ROWS):
                x, docs = part.x[:tokens].float(), part.doc[:tokens]
                for doc in set(docs.tolist()) - of_doc.keys():
                    of_doc[doc] = side_of.get(self.train.category(doc) or "", others)
                side = torch.tensor([of_doc[doc] for doc in docs.tolist()])
                yield x, x, torch.as_tensor(docs.view("int64")), side
                tokens -= len(x)
                if tokens <= 0:
                    return
            logger.info("reading text of both kinds: %s rows are left", f"{tokens:,}")


def steer_run(run: Path, name: str, config: SteerConfig, *, out: Path) -> dict[str, Any]:
    """Does what `config` asks for with a run's dictionary of that name; writes the page and returns its figures."""
    of = SteeredRun(run, name)
    settings = to_dict(config) | {"run": str(run.absolute()), "dictionary": name}
    made_from = digest([settings, of.dictionary.info, of.model.fingerprint])
    found: dict[str, Any] = {"made_from": made_from, "settings": settings, "model": of.model.name, "hook": of.hook}
    before = _read_before(out, made_from)
    subject = Subject(
        of.model, of.dictionary, of.activity(run), of.separator, of.sequences(config.loss_sequences),
        labels(run) if name == MAIN else {},
    )  # fmt: skip
    found["activity"] = subject.activity.source
    if config.sources:
        found |= study.sources(config, subject)
    difference = None
    if config.toward:
        told = contrast(of.batches(config), of.encode, n_latents=of.dictionary.n_latents)
        difference = told.difference_in_means
        found["search"] = study.search(tell_apart(told, of.dictionary.parameters.W_dec), config, subject.labels) | {
            "documents": told.side.bincount(minlength=2).tolist(), "rows": told.rows.tolist()}  # fmt: skip
    if config.logits:
        found["attribution"] = study.attribution(config, subject)
    if config.clamp:
        steps, facts = study.conditions(config, subject, difference)
        found |= {"clamped": study.clamped(config, subject), **facts, "conditions": dict(before.get("conditions", {}))}
        for condition, apply in steps.items():
            if condition not in found["conditions"]:
                found["conditions"][condition] = study.measure(condition, apply, config, subject)
                write_json(out / "steer.json", found)
    write_json(out / "steer.json", found)
    write_page(out, found)
    return found


def _read_before(out: Path, made_from: str) -> dict[str, Any]:
    """What an earlier attempt at the same has found; nothing where it was something else."""
    path = out / "steer.json"
    if not path.is_file():
        return {}
    cure = "remove it, or choose another out="
    before = parse_json(path.read_bytes(), dict[str, Any], name=str(path), cure=cure)
    return before if before.get("made_from") == made_from else {}
