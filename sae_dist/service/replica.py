"""One process of a model replica: loads the model, or a part of it, harvests units and evaluates dictionaries."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
import torch

from sae_dist import faults, storage
from sae_dist.config import UserError
from sae_dist.config import load as load_config
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import Harvester, Progress, UnitReport
from sae_dist.model import parallel
from sae_dist.model.config import ModelConfig
from sae_dist.model.engine import Description, describe, open_engine, whole_model
from sae_dist.model.load import LanguageModel, chosen_device
from sae_dist.model.matmul_rate import matmul_flop_per_s
from sae_dist.model.parallel import ONE_PROCESS
from sae_dist.parallel.key_value import StoreAddress, StoreServer
from sae_dist.service import evaluate_job
from sae_dist.service.config import RunConfig
from sae_dist.service.parent_watch import exit_with_parent
from sae_dist.shards import stores
from sae_dist.text.tokenize import TokenSplit

logger = logging.getLogger(__name__)


class ReplicaConfig(NamedTuple):
    """What a replica needs to know; plain values that can be sent to another process."""

    model: dict[str, Any]
    harvest: dict[str, Any]
    hooks: tuple[str, ...]
    store_uri: str | None  # None: it only describes its model
    split: TokenSplit | None


class Loaded(NamedTuple):
    """A process that has loaded its model; flop_per_s is its speed on a plain matrix product."""

    rank: int
    node: str
    pid: int
    flop_per_s: float
    description: Description


class Replica:
    """A Ray actor's class, with `CONCURRENCY` threads: units overlap, and `pulse` is answered beside them."""

    CONCURRENCY = 4  # two units, a pulse, and one to spare

    def __init__(self, config: ReplicaConfig, rank: int, size: int, threads: int) -> None:
        exit_with_parent()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if not ray.get_gpu_ids():  # it reserved none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(threads)
        self._config, self._rank, self._size = config, rank, size
        self._harvest = load_config(HarvestConfig, config.harvest)
        self._model = load_config(ModelConfig, config.model)
        self._served: StoreServer | None = None
        self._harvester: Harvester | None = None
        self._progress: dict[str, Any] = {}

    def meet(self) -> StoreAddress:
        """Serves the key-value store where the processes of the replica meet; called in rank 0."""
        self._served = StoreServer(ray.util.get_node_ip_address())
        return self._served.address

    def load(self, at: StoreAddress | None) -> Loaded:
        """Joins the others, if there are others (`at`), and loads the model or this process's part of it."""
        group = ONE_PROCESS
        faults.point("replica.before_load", rank=self._rank)
        device = chosen_device(self._model.device)
        if at is not None:
            group = parallel.join(
                self._rank, self._size, at=at, device=device, served=self._served,
                timeout_s=self._harvest.start_timeout_s,
            )  # fmt: skip
        self._engine = open_engine(self._model, group)
        if self._config.store_uri is not None:
            self._open_store(self._config.store_uri, leads=group.leads)
        reached = matmul_flop_per_s(self._engine.device, getattr(torch, self._engine.dtype))
        description = describe(self._engine, self._config.hooks)
        return Loaded(self._rank, ray.util.get_node_ip_address(), os.getpid(), reached, description)

    def _open_store(self, uri: str, *, leads: bool) -> None:
        assert self._config.split is not None
        self._split = self._config.split
        self._store = stores.open(storage.open(uri))
        if self._engine.fingerprint != self._store.meta.model_fingerprint:
            raise UserError(
                f"model.name={self._engine.name} is here in {self._engine.dtype} or with other weights "
                "than where the store was made; set model.dtype and model.revision, so that all machines load the same"
            )
        self._harvester = Harvester(
            self._engine, self._store, self._config.hooks, split=self._split, config=self._harvest,
            leads=leads,
        )  # fmt: skip

    def harvest(self, unit: int, turn: int, producer: str) -> UnitReport | None:
        """Harvests one unit and commits it in the name of `producer`; None in a process that does not lead."""
        assert self._harvester is not None, "the model is not loaded"
        return self._harvester.harvest(unit, turn, producer=producer)

    def pulse(self) -> Progress:
        """What was done so far: a sign of life that changes with every batch, request to storage and commit."""
        return Progress(0, 0, 0) if self._harvester is None else self._harvester.progress

    def progress(self) -> dict[str, Any]:
        """How far `evaluate` or `pages` is; may be called while they run."""
        return self._progress

    @functools.cached_property
    def _language_model(self) -> LanguageModel:
        """The model as torch modules: the engine's own, or one loaded now."""
        return whole_model(self._engine, self._model)

    def evaluate(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The figures of a run's dictionaries of these names on held-out text, by name."""
        return evaluate_job.evaluate(
            load_config(RunConfig, values), self._language_model, store=self._store,
            stream=self._split.heldout, names=names, progress=self._say,
        )  # fmt: skip

    def pages(self, values: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the feature pages of a run's dictionary; returns the path of their index."""
        path = evaluate_job.pages(
            load_config(RunConfig, values), self._language_model, store=self._store,
            stream=self._split.train, summary=summary, progress=self._say,
        )  # fmt: skip
        return {"index": str(path)}

    def _say(self, **facts: Any) -> None:
        self._progress = facts
