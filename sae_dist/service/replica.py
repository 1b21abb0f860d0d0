"""A model replica: a process with the language model in memory, which harvests units and judges dictionaries."""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.config import load as load_config
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import Harvester, UnitReport
from sae_dist.model.config import ModelConfig
from sae_dist.model.engine import open_engine, whole_model
from sae_dist.model.load import LanguageModel
from sae_dist.service import judge
from sae_dist.service.config import RunConfig
from sae_dist.shards import reader
from sae_dist.text.tokenize import TokenSplit

logger = logging.getLogger(__name__)


class ReplicaConfig(NamedTuple):
    """What a replica needs to know; plain values, since it crosses a process border."""

    model: dict[str, Any]
    harvest: dict[str, Any]
    hooks: tuple[str, ...]
    store_uri: str
    split: TokenSplit


class Replica:
    """The actor's class; `harvesting` makes it one, with max_concurrency=2."""

    def __init__(self, config: ReplicaConfig, threads: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        torch.set_num_threads(threads)
        self._config, self._harvest = config, load_config(HarvestConfig, config.harvest)
        self._model = load_config(ModelConfig, config.model)
        self._engine = open_engine(self._model)
        self._store = reader.open(storage.open(config.store_uri))
        if self._engine.fingerprint != self._store.meta.model_fingerprint:
            raise UserError(
                f"model.name={self._engine.name} is here in {self._engine.dtype} or with other weights "
                "than where the store was made; set model.dtype and model.revision, so that all machines load the same"
            )
        self._harvester = Harvester(self._engine, self._store, config.hooks, split=config.split, config=self._harvest)
        self._progress: dict[str, Any] = {}

    def progress(self) -> dict[str, Any]:
        """How far `evaluate` or `pages` is; answered beside them, so the actor needs max_concurrency=2."""
        return self._progress

    def harvest(self, unit: int) -> UnitReport:
        """Harvests one unit and commits it."""
        report = self._harvester.harvest(unit)
        assert report is not None
        return report

    @functools.cached_property
    def _language_model(self) -> LanguageModel:
        """The model as modules; the engine's own where it has one."""
        return whole_model(self._engine, self._model)

    def evaluate(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of a run's dictionary on held-out text."""
        return judge.evaluate(
            load_config(RunConfig, values), self._language_model, store=self._store,
            stream=self._config.split.heldout, progress=self._say,
        )  # fmt: skip

    def pages(self, values: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the feature pages of a run's dictionary; where their index is."""
        path = judge.pages(
            load_config(RunConfig, values), self._language_model, store=self._store,
            stream=self._config.split.train, summary=summary, progress=self._say,
        )  # fmt: skip
        return {"index": str(path)}

    def _say(self, **facts: Any) -> None:
        self._progress = facts
