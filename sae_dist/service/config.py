"""Configurations of whole jobs: run, harvest and train, made of the parts' own configurations."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import digest, frozen, local_folder, to_dict
from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.harvest.config import HarvestConfig
from sae_dist.interpret.collect import PagesConfig
from sae_dist.model.config import ModelConfig
from sae_dist.monitor.config import AlertsConfig, PrometheusConfig, WandbConfig
from sae_dist.sae.config import SAEConfig
from sae_dist.shards.order import OrderConfig
from sae_dist.text.corpus import TextConfig
from sae_dist.train.config import MeshConfig, TrainConfig
from sae_dist.train.members import Member, Twin, members, twin_entries

ONE_PASS = 0.95  # share of a harvest's positions that surely become rows; separators and outliers do not


@frozen
class RunConfig:
    """text + model -> store -> dictionary -> evaluation -> feature pages."""

    out: str | None = None  # the run's folder; null: runs/<model>-<hook>-<dictionary>
    mirror: str | None = None  # s3://bucket/prefix: a copy of status, metrics and results, for `sae-dist status`
    seed: int = 0
    cluster: str = "local"  # local: Ray for this run on this machine; else the address of a Ray cluster
    model: ModelConfig
    # one, or a list, which one dictionary rebuilds (a crosscoder): [resid_post.4, resid_post.9]
    hook: str | tuple[str, ...]
    text: TextConfig
    store: str | None = None  # folder or URI of the activation store; null: <out>/store
    harvest: HarvestConfig
    sae: SAEConfig
    # more dictionaries in the same pass, each by what differs of its keys of sae, of seed, lr, parameters, moments,
    # start_from (of train) and of name: 'more_dictionaries=[{n_latents: 8192}, {k: 64, seed: 1, name: denser}]';
    # pages show the main one
    more_dictionaries: tuple[dict[str, Any], ...] = ()
    # dictionaries of another seed that the main one is compared to in summary.json, trained in the same pass: like it,
    # with a decoder that stays random, or as before step 0
    twins: tuple[Twin, ...] = ()
    order: OrderConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig
    wandb: WandbConfig
    tensorboard: bool | str = False  # event files for TensorBoard: true for <out>/tensorboard, or a folder for them
    prometheus: PrometheusConfig = PrometheusConfig()
    alerts: AlertsConfig = AlertsConfig()
    pages: PagesConfig | None = None  # pages=null: no feature pages

    def __post_init__(self) -> None:
        if self.out is not None:
            local_folder("out", self.out)
        _check_cache(self.train, self.store_uri)
        _check_layers(self, self.hooks, self.hooks)
        _ = self.members  # a wrong entry is refused here
        ahead, round_units = self.harvest.ahead_units, self.order.round_units
        per_unit = self.harvest.unit_sequences * (self.harvest.context - self.harvest.rows.drop_first)
        most = max(member.sae.n_latents for member in self.members)
        init_rows = self.train.rows_to_begin(most, stored=self.harvest.tokens)
        least = 2 * max(round_units, -(-init_rows // per_unit))
        if ahead and (round_units == 0 or ahead < least):
            raise ValueError(
                f"harvest.ahead_units={ahead} with order.round_units={round_units}: training waits for whole rounds "
                f"and for {init_rows:,} rows to begin from (train.init_rows); give {least} or more, with rounds that "
                "are not 0"
            )
        rows = self.harvest.tokens * (1 - self.harvest.rows.drop_first / self.harvest.context)
        wanted = self.train.n_steps * self.train.batch
        if self.harvest.retention != "keep" and wanted > ONE_PASS * rows:
            raise ValueError(
                f"harvest.retention={self.harvest.retention} deletes what was read once, and {wanted} rows "
                f"to train on are more than {ONE_PASS:.0%} of one pass; lower train.tokens to {int(ONE_PASS * rows)}"
            )

    @property
    def folder(self) -> Path:
        """`out`, or the default that model, hook point and dictionary name; absolute, for other processes."""
        if self.out is not None:
            return Path(self.out).absolute()
        hooks, sae = "+".join(self.hooks), self.sae
        name = f"{self.model.name}-{hooks}-{sae.kind}{sae.n_latents}-k{sae.k}-seed{self.seed}"
        return Path("runs").absolute() / re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")

    @property
    def hooks(self) -> tuple[str, ...]:
        return names(self.hook)

    @property
    def members(self) -> tuple[Member, ...]:
        """All dictionaries of the pass, the main one first."""
        return _members(self)

    @property
    def store_uri(self) -> str:
        return absolute_uri(self.store) if self.store is not None else str(self.folder / "store")

    def with_absolute_paths(self) -> "RunConfig":
        """The same with absolute paths, for processes with other working directories.

        A store in the run's folder stays null, so that the folder can be copied as a whole.
        """
        store = _absolute(self.store)
        return dataclasses.replace(
            self,
            out=str(self.folder),
            mirror=_absolute(self.mirror),
            store=store,
            model=self.model.with_absolute_paths(),
            train=dataclasses.replace(self.train, start_from=_absolute(self.train.start_from)),
            more_dictionaries=_absolute_starts(self.more_dictionaries),
        )

    def train_job(self) -> "TrainJob":
        """The training part of the run."""
        return TrainJob(
            out=str(self.folder), seed=self.seed, store=self.store_uri, hook=self.hook, sae=self.sae,
            more_dictionaries=self.more_dictionaries, twins=self.twins, order=self.order, train=self.train,
            mesh=self.mesh, wandb=self.wandb, tensorboard=self.tensorboard, prometheus=self.prometheus,
            alerts=self.alerts, cluster=self.cluster, live=True,
        ).with_absolute_paths()  # fmt: skip


@frozen
class HarvestJob:
    """text + model -> store."""

    out: str = "runs/harvest"  # tokens and status
    mirror: str | None = None  # s3://bucket/prefix: a copy of status, metrics and results, for `sae-dist status`
    cluster: str = "local"  # local: Ray for this job on this machine; else the address of a Ray cluster
    model: ModelConfig
    hook: str | tuple[str, ...]  # one, or a list: [resid_post.4, resid_post.9]
    text: TextConfig
    store: str  # folder or URI of the activation store
    harvest: HarvestConfig
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool | str = False  # event files for TensorBoard: true for <out>/tensorboard, or a folder for them
    prometheus: PrometheusConfig = PrometheusConfig()
    alerts: AlertsConfig = AlertsConfig()

    def __post_init__(self) -> None:
        local_folder("out", self.out)

    @property
    def hooks(self) -> tuple[str, ...]:
        return names(self.hook)

    def with_absolute_paths(self) -> "HarvestJob":
        """The same with absolute places: other processes have other working directories."""
        return dataclasses.replace(
            self, out=str(Path(self.out).absolute()), mirror=_absolute(self.mirror), store=absolute_uri(self.store),
            model=self.model.with_absolute_paths(),
        )  # fmt: skip


@frozen
class TrainJob:
    """store -> dictionary."""

    out: str
    mirror: str | None = None  # s3://bucket/prefix: a copy of status, metrics and results, for `sae-dist status`
    seed: int = 0
    store: str  # folder or URI of an activation store
    live: bool = False  # true: a harvest is still filling the store; rows are waited for
    # one of the store, or a list, which one dictionary rebuilds (a crosscoder); null: the only one that it has
    hook: str | tuple[str, ...] | None = None
    # null: what is read is rebuilt (an autoencoder); else others of the store, rebuilt from it (a transcoder)
    target_hook: str | tuple[str, ...] | None = None
    sae: SAEConfig
    # more dictionaries in the same pass, each by what differs of its keys of sae, of seed, lr, parameters, moments,
    # start_from (of train) and of name: 'more_dictionaries=[{n_latents: 8192}, {k: 64, seed: 1, name: denser}]'
    more_dictionaries: tuple[dict[str, Any], ...] = ()
    # dictionaries of another seed that the main one is compared to in summary.json, trained in the same pass: like it,
    # with a decoder that stays random, or as before step 0
    twins: tuple[Twin, ...] = ()
    order: OrderConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    wandb: WandbConfig
    tensorboard: bool | str = False  # event files for TensorBoard: true for <out>/tensorboard, or a folder for them
    prometheus: PrometheusConfig = PrometheusConfig()
    alerts: AlertsConfig = AlertsConfig()
    cluster: str = "local"  # of the actors of a mesh. local: Ray for this job here; else the address of a Ray cluster

    def __post_init__(self) -> None:
        local_folder("out", self.out)
        _check_cache(self.train, absolute_uri(self.store))
        _check_layers(self, names(self.hook or ()), names(self.target_hook or self.hook or ()))
        if self.target_hook is not None and self.hook is not None and names(self.target_hook) == names(self.hook):
            raise ValueError(
                f"target_hook={'+'.join(names(self.target_hook))} is hook itself; leave it out: an autoencoder "
                "rebuilds hook"
            )
        _ = self.members  # a wrong entry is refused here

    @property
    def members(self) -> tuple[Member, ...]:
        """All dictionaries of the pass, the main one first."""
        return _members(self, transcodes=self.target_hook is not None)

    def with_absolute_paths(self) -> "TrainJob":
        """The same with absolute places: other processes have other working directories."""
        checkpoints = _absolute(self.train.checkpoints)
        cache = None if self.train.cache is None else str(Path(self.train.cache).absolute())
        return dataclasses.replace(
            self, out=str(Path(self.out).absolute()), mirror=_absolute(self.mirror), store=absolute_uri(self.store),
            train=dataclasses.replace(
                self.train, checkpoints=checkpoints, cache=cache, start_from=_absolute(self.train.start_from)
            ),
            more_dictionaries=_absolute_starts(self.more_dictionaries),
        )  # fmt: skip


def names(hook: str | tuple[str, ...]) -> tuple[str, ...]:
    """One hook point or several, as several."""
    return (hook,) if isinstance(hook, str) else hook


def absolute_uri(place: str) -> str:
    """A folder as an absolute path; anything with a scheme as it is."""
    return place if "://" in place else str(Path(place).absolute())


def _absolute(place: str | None) -> str | None:
    return None if place is None else absolute_uri(place)


def _absolute_starts(more: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Entries of `more_dictionaries` with absolute places."""
    key = "start_from"
    return tuple(
        {**entry, key: absolute_uri(entry[key])} if isinstance(entry.get(key), str) else entry for entry in more
    )


def _check_cache(train: TrainConfig, store_uri: str) -> None:
    if train.cache is not None and store_uri.startswith(("/", "file://")):
        raise ValueError(
            f"train.cache={train.cache}: store={store_uri} is a local folder already; set train.cache=null"
        )


# Keys that may differ between two starts of one run: they say where and how fast it works, not what it works out.
# (Another thread count, batch size or sharding may round a model's products otherwise, as another machine may.) A store
# counts by content.
KEYS_FREE_TO_CHANGE = (
    "out", "mirror", "store", "live", "cluster", "wandb", "tensorboard", "prometheus", "alerts", "evaluate", "pages",
    "mesh", "harvest.replicas", "harvest.threads", "harvest.gpus", "harvest.lease_s", "harvest.start_timeout_s",
    "harvest.ahead_units", "harvest.retention", "harvest.ring_gb", "harvest.batch_sequences",
    "harvest.batch_memory_gb", "harvest.tensor_parallel", "model.device_map", "train.log_every", "train.cache",
    "train.cache_gb", "train.checkpoints", "train.keep_checkpoints", "train.keep_every", "train.checkpoint_every",
    "train.micro_batch", "train.launcher", "train.max_restarts", "train.device",
)  # fmt: skip


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's values, those that decide what comes out, flat: {'train.batch': 4096, ...}."""

    def flatten(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {prefix: value}
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{prefix}.{key}".lstrip(".")).items()}

    flat = flatten(values, "")
    return {
        k: v for k, v in flat.items() if not any(k == free or k.startswith(f"{free}.") for free in KEYS_FREE_TO_CHANGE)
    }


def config_hash(config: object, store: str) -> str:
    """Equal for two runs that must end in the same dictionary; `store` is the digest of the store's description."""
    return digest([identity(to_dict(config)), store])[:16]


def evaluation_digest(config: RunConfig) -> str:
    """What may differ between two runs of one dictionary: how it is judged and shown."""
    return digest([to_dict(config)[part] for part in ("evaluate", "pages")])


def _check_layers(job: RunConfig | TrainJob, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
    """ValueError where a cross-layer dictionary has no layers, or a layer has no latents."""
    if not job.train.cross_layer:
        return
    if len(reads) < 2 or len(reads) != len(writes):
        raise ValueError(
            f"train.cross_layer=true with {len(reads)} hook points that are read and {len(writes)} that are rebuilt; "
            "give hook and target_hook as many, two or more, in the order of layers"
        )
    if any(member.moments == "factored" for member in job.members):
        raise ValueError(
            "train.moments=factored with train.cross_layer=true: it averages over dimensions that a latent does not "
            "read, so that its steps would be too large; use int8"
        )
    least = min(member.sae.n_latents for member in job.members)
    if least < len(reads):
        raise ValueError(
            f"sae.n_latents={least} for {len(reads)} layers of train.cross_layer=true; give each a latent at least"
        )


def _members(job: RunConfig | TrainJob, *, transcodes: bool = False) -> tuple[Member, ...]:
    if job.train.skip and not transcodes:
        raise ValueError(
            "train.skip=true without target_hook: a linear map from x to itself would rebuild x by itself; set "
            "target_hook (of `train`), or train.skip=false"
        )
    more = [*job.more_dictionaries, *twin_entries(job.twins, seed=job.seed)]
    return members(
        more, sae=job.sae, seed=job.seed, lr=job.train.lr, parameters=job.train.parameters, moments=job.train.moments,
        transcodes=transcodes, skip=job.train.skip, cross_layer=job.train.cross_layer, start_from=job.train.start_from,
    )  # fmt: skip
