"""The numbers of a training that memory, traffic and time depend on."""

from typing import NamedTuple

from sae_kernels.row_state import StateOptions

from sae_dist.config import UserError
from sae_dist.plan.machine import Backend
from sae_dist.sae.config import SAEConfig, check_width, resolved_k_aux
from sae_dist.sae.variants.interface import Sizes, Top, Variant, own_vectors
from sae_dist.shards.order import OrderConfig
from sae_dist.train.config import MOST_INIT_ROWS, TrainConfig


class Workload(NamedTuple):
    """A dictionary on a mesh, and perhaps `others` in the same pass. Properties are those of the largest rank.

    Numbers are of the main dictionary; `members` has a workload for each.
    """

    sae: Variant
    d_model: int
    batch: int  # rows of an optimiser step, over all ranks
    sites: int = 1  # hook points that d_model is the sum of
    data: int = 1  # ranks that share the rows
    feature: int = 1  # ranks that share the latents
    dead: int = 0  # assumed number of dead latents, which AuxK trains
    steps: int = 1
    init_rows: int = 0  # sample of rows from which a run begins
    prefetch: int = 4  # batches read ahead
    lanes: int = 8  # readers, and slices that each has open: memory of the loader
    window: int = 4
    slice_rows: int = 8192
    stored_bytes: int = 2  # an element of a stored row
    store_rows: int = 0  # rows of the store, 0 where unknown
    masked: bool = False  # latents of layers, whose gradients are made dense to be masked
    state: StateOptions = StateOptions()  # how weights and moments are stored
    others: "tuple[Workload, ...]" = ()  # other dictionaries over the same batches

    @property
    def members(self) -> "tuple[Workload, ...]":
        """Every dictionary of the pass by itself."""
        return (self._replace(others=()), *self.others)

    @property
    def n_latents(self) -> int:
        return self.sae.n_latents

    @property
    def k(self) -> int:
        """Latents a row, in the mean."""
        return self.sae.rule.k

    @property
    def k_aux(self) -> int:
        return resolved_k_aux(self.sae, self.d_model // self.sites)

    @property
    def in_lines(self) -> bool:
        """Whether rows have different numbers of latents, so that pairs are stored in lines."""
        return not isinstance(self.sae.rule, Top)

    @property
    def vectors(self) -> int:
        """Number of vectors [n_latents] that the kind learns besides AUTOENCODER."""
        return len(own_vectors(self.sae))

    @property
    def ranks(self) -> int:
        return self.data * self.feature

    @property
    def latents(self) -> int:
        """Latents of the largest rank, as `parallel.mesh.owned_range` cuts."""
        return -(-self.n_latents // self.feature)

    @property
    def rows(self) -> int:
        """Rows of the batch that one rank encodes: those of its place on the data axis."""
        return -(-self.batch // self.data)

    @property
    def parameters(self) -> int:
        """Learned numbers of the whole dictionary."""
        sizes = Sizes(self.n_latents, self.d_model, self.d_model)
        return sum(spec.size(sizes) for spec in self.sae.tensors if spec.role == "learned")

    def kernels(self, backend: Backend) -> Backend:
        """The backend of its steps on a machine with `backend`: on a GPU plain torch, unless all state is fp32."""
        return "torch" if backend == "triton" and not self.state.plain else backend

    def on_mesh(self, *, data: int, feature: int) -> "Workload":
        """The same on another mesh."""
        others = tuple(member.on_mesh(data=data, feature=feature) for member in self.others)
        return self._replace(data=data, feature=feature, others=others)


def check(work: Workload) -> None:
    """UserError for a mesh on which some rank would have nothing to do."""
    for member in work.members:
        if (member.feature - 1) * member.latents >= member.n_latents:
            raise UserError(
                f"mesh.feature={member.feature} ranks for sae.n_latents={member.n_latents}: parts of {member.latents} "
                f"leave the last rank without a latent; use mesh.feature={-(-member.n_latents // member.latents)}"
            )
    if work.data > work.batch:
        raise UserError(f"mesh.data={work.data} ranks for train.batch={work.batch} rows; use mesh.data<={work.batch}")
    if work.data > work.lanes:
        raise UserError(
            f"mesh.data={work.data} readers with order.lanes={work.lanes}; set order.lanes={work.data} or more"
        )


def workload(
    sae: SAEConfig, train: TrainConfig, order: OrderConfig, *, d_model: int, sites: int, data: int, feature: int,
    dead_fraction: float, store_rows: int, stored_bytes: int, slice_rows: int, state: StateOptions,
) -> Workload:  # fmt: skip
    """The numbers of a run's configuration; UserError where the dictionary cannot work on this width."""
    check_width(sae, d_model)
    return Workload(
        sae=sae, d_model=d_model, batch=train.batch, sites=sites, data=data, feature=feature,
        dead=round(dead_fraction * sae.n_latents), steps=train.n_steps, lanes=order.lanes,
        init_rows=train.rows_to_begin(sae.n_latents, stored=store_rows or MOST_INIT_ROWS),
        window=order.window, slice_rows=slice_rows, stored_bytes=stored_bytes, store_rows=store_rows,
        masked=train.cross_layer, state=state,
    )  # fmt: skip
