"""Replicas and ranks on GPUs: one each where there are enough, else shares, and never two ranks on one."""

import dataclasses
from typing import Any

import pytest

from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.harvest.config import HarvestConfig
from sae_dist.service.gpu_shares import describe_shares, share_gpus
from sae_dist.service.placement import Node, fits
from sae_dist.train.config import MeshConfig


def nodes(*gpus: float) -> list[Node]:
    return [Node(f"host{n}", {"CPU": 8, "GPU": g}, {"CPU": 8, "GPU": g}) for n, g in enumerate(gpus)]


ONE, FOUR = MeshConfig(), MeshConfig(data=2, feature=2)
HARVEST = HarvestConfig()


def replicas(n: int, **more) -> HarvestConfig:
    return dataclasses.replace(HARVEST, replicas=n, **more)


@pytest.mark.parametrize(
    "harvest, mesh, there, device, replica, rank",
    [
        (HARVEST, ONE, nodes(0), "auto", 0, 0),
        (HARVEST, ONE, nodes(1), "auto", 0.4, 0.6),  # they take turns on the only one
        (HARVEST, ONE, nodes(2), "auto", 1, 1),
        (HARVEST, ONE, nodes(8), "auto", 1, 1),
        (HARVEST, ONE, nodes(1), "cpu", 1, 0),
        (replicas(3), ONE, nodes(1), "auto", 0.1333, 0.6),
        (replicas(3), ONE, nodes(2), "auto", 0.3333, 1),  # the second GPU is the replicas'
        (replicas(4), FOUR, nodes(8), "auto", 1, 1),
        (replicas(4), FOUR, nodes(4), "auto", 0.4, 0.6),
        (replicas(8), FOUR, nodes(2, 2), "auto", 0.2, 0.6),
        (replicas(2), FOUR, nodes(3), "auto", 1, 0),  # ranks cannot share one: all of them on processors
        (replicas(2, tensor_parallel=2), FOUR, nodes(8), "auto", 1, 1),
        (replicas(2, tensor_parallel=2), FOUR, nodes(4), "auto", 1, 0),  # nor can processes of a replica
        (replicas(2, tensor_parallel=2), ONE, nodes(2), "auto", 0, 0),
        (None, FOUR, nodes(2, 2), "auto", 0, 1),
        (None, FOUR, nodes(*[0.5] * 8), "auto", 0, 0),  # halves of GPUs are none
        (replicas(3), None, nodes(2), "auto", 0.5, 0),
        (replicas(1, gpus=1.0), FOUR, nodes(4), "auto", 1, 0),  # one is the harvest's
        (replicas(1, gpus=1.0), FOUR, nodes(4, 1), "auto", 1, 1),
        (replicas(1, gpus=0.25), ONE, nodes(1), "auto", 0.25, 0.6),
        (replicas(1, gpus=0.0), ONE, nodes(1), "auto", 0, 1),
    ],
)
def test_every_process_reserves_its_share(harvest, mesh, there, device, replica, rank):
    shares = share_gpus(there, harvest=harvest, mesh=mesh, device=device)
    if harvest is not None:
        assert shares.replica.gpus == replica
    if mesh is not None:
        assert shares.rank.gpus == rank
    wanted = [shares.replica] * (harvest.least_processes if harvest else 0)
    wanted += [shares.rank] * (mesh.data * mesh.feature if mesh else 0)
    assert sum(bundle.gpus for bundle in wanted) <= sum(node.total["GPU"] for node in there) + 1e-9
    assert all(not bundle.gpus or sum(fits(bundle, node.total) for node in there) for bundle in wanted)


def test_too_few_gpus_in_a_cluster_are_one_line():
    with pytest.raises(UserError) as error:
        share_gpus(nodes(2, 1), harvest=replicas(1, gpus=1.0), mesh=FOUR, device="cuda")
    assert str(error.value) == (
        "train.device=cuda needs 4 GPUs for mesh.data=2 x mesh.feature=2, one a rank, beside 1 of the harvest's, but "
        "the cluster has 3; lower mesh.data or mesh.feature, give cluster= a larger one, or use train.device=auto or "
        "cpu"
    )


def test_who_got_what_is_one_line():
    shares = share_gpus(nodes(1), harvest=replicas(2), mesh=ONE)
    assert (
        describe_shares(shares, replicas=2, ranks=1) == "2 replica processes: 0.2 of a GPU each; 1 rank: 0.6 of a GPU"
    )
    shares = share_gpus(nodes(0), harvest=HARVEST, mesh=FOUR)
    assert describe_shares(shares, replicas=1, ranks=4) == "1 replica process: on processors; 4 ranks: on processors"


def test_the_plan_says_it_too(capsys):
    assert main(["plan", "target=1M", "machine=h100", "mesh.feature=8", "d_model=768", "harvest.replicas=2"]) == 0
    assert "on 8 GPUs: 2 replica processes: 0.4 of a GPU each; 8 ranks: 0.6 of a GPU each" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_on_a_ray_that_believes_in_gpus_no_process_sees_another_ones(gpus):
    """Two ranks and a replica, by the shares: ranks never see one GPU, and who reserved none sees none."""
    import ray

    mesh = MeshConfig(feature=2)
    with ray.init(address="local", num_cpus=8, num_gpus=gpus, include_dashboard=False, configure_logging=False):

        class Process:
            def gpus(self) -> list[int]:
                return ray.get_gpu_ids()

        shares = share_gpus(nodes(gpus), harvest=HARVEST, mesh=mesh)
        wanted = [shares.replica, shares.rank, shares.rank]
        actor: Any = ray.remote(Process)
        actors = [actor.options(num_cpus=b.cpus, num_gpus=b.gpus).remote() for b in wanted]
        replica, *ranks = ray.get([each.gpus.remote() for each in actors], timeout=120)
    assert [len(seen) for seen in (replica, *ranks)] == [int(bundle.gpus > 0) for bundle in wanted]
    assert len({seen[0] for seen in ranks if seen}) == sum(bool(seen) for seen in ranks)
    assert bool(ranks[0]) == (gpus >= 2) and bool(replica) == (gpus >= 1)
