"""What the chosen pairs rebuild, and how far it is from the target, for the rows that this rank encodes."""

import torch
from jaxtyping import Float, Int
from sae_kernels.lines import Lines
from sae_kernels.reference import Selected
from sae_kernels.shard import Shard
from torch import Tensor

from sae_dist.sae.variants.interface import NORM, Elementwise, Nested, Variant, has_free_norms
from sae_dist.train.objective import OwnVectors, pair_values
from sae_dist.train.parallel.choose import Choice, Chooser, group_first
from sae_dist.train.parallel.collectives import gather_rows, sum_rows
from sae_dist.train.parallel.loss_terms import LocalTerm
from sae_dist.train.parallel.mesh import Mesh, owned_range, owned_ranges

LEAST_NORM = 1e-12  # of a decoder row, where it divides


class Decoder:
    """Decodes with this rank's part of a dictionary at its present parameters, in one step of training."""

    def __init__(self, shard: Shard, mesh: Mesh, sae: Variant, chooser: Chooser, *, sites: int) -> None:
        self.shard, self.mesh, self.sae, self._chooser = shard, mesh, sae, chooser
        self.own: dict[str, Tensor] = dict(shard.vectors)  # the latents' own vectors, and norms where these are free
        if has_free_norms(sae):
            of_sites = shard.W_dec.float().unflatten(1, (sites, -1))
            self.site_norms: Float[Tensor, "n_latents sites"] = of_sites.norm(dim=2).clamp_min(LEAST_NORM)
            self.own[NORM] = self.site_norms.sum(1)

    def own_at(self, z: Selected) -> OwnVectors:
        """The latents' own vectors at every place."""
        return {name: vector[z.indices] for name, vector in self.own.items()}

    def group(self, z: Selected) -> Int[Tensor, "lines places"]:
        """The first of the nested reconstructions that has a pair; 0 at empty places."""
        assert isinstance(self.sae, Nested)
        place = torch.arange(z.indices.shape[1], device=z.indices.device).expand(z.indices.shape)
        return torch.where(z.there, self.sae.group(z.indices + self._chooser.latents.start, place), 0)

    def local_term(self, choice: Choice, target: Float[Tensor, "batch d_out"]) -> LocalTerm:
        """The errors of the batch's `target` after the chosen pairs, for this rank's rows."""
        mine, z = owned_range(len(target), self.mesh.data), choice.selected
        target, decoded, cost, frozen = target[mine.start : mine.stop], z, None, None
        if isinstance(self.sae, Elementwise):
            values, cost, second = pair_values(self.sae, z, self.own_at(z))
            decoded = Selected(values, z.indices)
            if second is not None:
                frozen = self.errors(target, Selected(second, z.indices), choice.lines)
        if not isinstance(self.sae, Nested):
            return LocalTerm(self.errors(target, decoded, choice.lines), z, choice.lines, cost, frozen=frozen)
        nesting, group, errors = self.sae.nesting, self.group(z), list[Tensor]()
        for part in range(len(nesting.weights)):
            here = group_first(decoded, z.there & (group == part))
            errors.append(self.errors(errors[-1] if part else target, here, choice.lines, of_target=not part))
        weights = target.new_tensor(nesting.weights)[:, None, None]
        suffixes = (weights * torch.stack(errors)).flip(0).cumsum(0).flip(0).transpose(0, 1).contiguous()
        return LocalTerm(errors[nesting.finished], z, choice.lines, cost, nested=suffixes, frozen=frozen)

    def errors(
        self, wanted: Float[Tensor, "mine d_out"], decoded: Selected, lines: Lines | None, *, of_target: bool = True
    ) -> Float[Tensor, "mine d_out"]:
        """`wanted` less the sum of the pairs' decoder rows and, of a target, less b_dec."""
        errors, stages = list[Tensor](), self.shard.stages
        every = range(len(wanted))
        for chunk in self._chooser.chunks(every) if lines is None else [every]:
            of_chunk = decoded if lines is not None else Selected(*(part[chunk.start : chunk.stop] for part in decoded))
            partial = stages.partial(of_chunk)
            rebuilt = self._reduced(partial if lines is None else lines.summed(partial))
            errors.append(
                self._residual(wanted[chunk.start : chunk.stop], rebuilt + self.shard.b_dec if of_target else rebuilt)
            )
        return torch.cat(errors)

    def _reduced(self, partial: Float[Tensor, "rows d_out"]) -> Float[Tensor, "share d_out"]:
        """The sum of all parts' partial reconstructions, for this rank's share of the rows."""
        sizes = [len(r) for r in owned_ranges(len(partial), self.mesh.feature.size)]
        return sum_rows(self.mesh, self.mesh.feature, partial, sizes, name="reconstruction")

    def _residual(
        self, wanted: Float[Tensor, "rows d_out"], rebuilt: Float[Tensor, "share d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """wanted - reconstruction for all rows, gathered from the shares of the feature axis."""
        shares, feature = owned_ranges(len(wanted), self.mesh.feature.size), self.mesh.feature
        share = shares[feature.rank]
        left = wanted[share.start : share.stop] - rebuilt
        return gather_rows(self.mesh, feature, left, [len(r) for r in shares], name="errors")
