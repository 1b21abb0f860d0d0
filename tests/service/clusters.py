"""Several Ray nodes on this machine, on its loopback alone."""

from typing import Any

from ray.cluster_utils import Cluster

from sae_dist.service.local_ray import ENVIRONMENT, environment


class LoopbackCluster(Cluster):
    """As Ray's own, whose nodes would listen on every address of the machine."""

    def add_node(self, wait: bool = True, **arguments: Any) -> Any:
        with environment(ENVIRONMENT):
            return super().add_node(wait, node_ip_address="127.0.0.1", **arguments)
