"""The description of a model that is too large for one process: taken from its store, or from a replica."""

import functools
import time
from collections.abc import Callable

from sae_dist import storage
from sae_dist.config import to_dict
from sae_dist.harvest.config import HarvestConfig
from sae_dist.model.config import ModelConfig
from sae_dist.model.engine import Description
from sae_dist.service.cluster import cluster, nodes
from sae_dist.service.gpu_shares import share_gpus
from sae_dist.service.replica import ReplicaConfig
from sae_dist.service.replica_handle import ReplicaHandle, ReplicaLost
from sae_dist.service.replica_pool import check_harvest_capacity, replica_shape
from sae_dist.shards import stores


def describe_on_cluster(
    model: ModelConfig, harvest: HarvestConfig, hooks: tuple[str, ...], store_uri: str, address: str
) -> Callable[[], Description] | None:
    """A function that describes a tensor-parallel model; None where this process can load the model itself."""
    if harvest.tensor_parallel == 1:
        return None
    return functools.partial(_by_store_or_replica, model, harvest, hooks, store_uri=store_uri, address=address)


def _by_store_or_replica(
    model: ModelConfig, harvest: HarvestConfig, hooks: tuple[str, ...], *, store_uri: str, address: str
) -> Description:
    """The description in store.json if there is one; else a replica is started on the cluster at `address` and asked.

    Every replica compares the store's description with its own model before it harvests.
    """
    place = storage.open(store_uri)
    if place.exists("store.json"):
        meta = stores.open(place).meta
        if meta.hooks.keys() == set(hooks):
            return Description(meta.model, meta.model_fingerprint, dict(meta.hooks))
    config = ReplicaConfig(to_dict(model), to_dict(harvest), hooks, None, None)
    with cluster(address, cpus=harvest.most_processes) as request:
        bundle = share_gpus(nodes(), harvest=harvest).replica
        check_harvest_capacity(harvest, bundle)
        shape = replica_shape(harvest, bundle)
        handle = ReplicaHandle(0, config, shape, start_timeout_s=harvest.start_timeout_s, now=time.monotonic())
        try:
            while not handle.ready:
                request.check()
                handle.advance(time.monotonic())
                time.sleep(0.05)
            return handle.loaded[0].description
        except ReplicaLost as loss:
            raise RuntimeError(
                f"the replica that was to describe {model.name} died while {handle.state}: {loss}"
            ) from loss
        finally:
            handle.close()
