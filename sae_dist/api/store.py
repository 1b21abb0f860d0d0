"""`sae_dist.Store`: the rows of an activation store, in the order of training, as a torch data set."""

from collections.abc import Iterator
from os import PathLike
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import reader, stores
from sae_dist.shards.hooks import Hooks, check
from sae_dist.shards.loader import Batch, Loader
from sae_dist.shards.order import OrderConfig


class Store(IterableDataset[Batch]):
    """Shuffled batches of a finished store; a `for` goes on to the end of the epoch, the next one begins the next.

    A batch has x [batch, d] in the store's dtype, target (x itself, or the rows of `target_hook`), and doc, pos, token
    of each row. The order is a function of the store, seed, batch and `order`, the same for any number of readers:
    `rank` of `world` gets its share of every batch. `state_dict` is a few numbers; with it, iteration goes on at that
    batch, in another process too. For a DataLoader: batch_size=None and no workers, since threads read ahead here.
    """

    def __init__(
        self, where: str | PathLike[str], *, hook: str | None = None, target_hook: str | None = None,
        batch: int = 4096, seed: int = 0, rank: int = 0, world: int = 1, order: OrderConfig | None = None,
    ) -> None:  # fmt: skip
        """`where`: a folder or s3://bucket/prefix. `hook` may be left out where there is one.

        UserError where that is no store, or it has no such hook points.
        """
        if batch < 1:
            raise UserError(f"batch={batch} rows; give 1 or more")
        self._store = stores.open(storage.open(str(where)))
        self._given = {"batch": batch, "seed": seed, "rank": rank, "world": world, "order": order or OrderConfig()}
        self.batch, self.step, self.order_hash = batch, 0, 0
        if hook is None and len(self.hooks) > 1:
            raise UserError(f"hook is missing; store={where} has {', '.join(self.hooks)}")
        reads = (hook or next(iter(self.hooks)),)
        self._hooks = Hooks(reads, () if target_hook is None else (target_hook,))
        check(self._hooks, self._store.meta, self.uri)

    @property
    def uri(self) -> str:
        return self._store.storage.uri

    @property
    def model(self) -> str:
        """The language model that made the activations."""
        return self._store.meta.model

    @property
    def hooks(self) -> dict[str, int]:
        """Its hook points, each with its width."""
        return dict(self._store.meta.hooks)

    @property
    def rows(self) -> int:
        """Rows of one epoch: all that are not held out."""
        meta = self._store.meta
        return sum(commit.rows for unit, commit in self._store.committed().items() if unit < meta.train_units)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UserError("a DataLoader with workers would read every row in each; use num_workers=0")
        epoch = self.step * self.batch // max(self.rows, 1)
        stop = max(self.step + 1, (epoch + 1) * self.rows // self.batch)
        with Loader(
            self._store, hooks=self._hooks, start_step=self.step, stop_step=stop, order_hash=self.order_hash,
            **self._given,
        ) as loader:  # fmt: skip
            for found in loader:
                self.step, self.order_hash = found.step + 1, found.order_hash
                yield found

    def heldout(self, batch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """x and target of the rows that training never reads, in the order stored."""
        return reader.heldout_pairs(self._store, self._hooks, batch or self.batch)

    def state_dict(self) -> dict[str, Any]:
        """Where iteration is: after `step` batches, whose rows are in `order_hash`; JSON-ready."""
        return {"step": self.step, "order_hash": f"{self.order_hash:016x}", **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was; UserError where it is of another store, batch, seed or order."""
        if other := [key for key, own in self._identity().items() if state.get(key) != own]:
            said = ", ".join(f"{key}={state.get(key)}" for key in other)
            raise UserError(f"this state is of {said}; make the store with the same, or begin anew")
        self.step, self.order_hash = state["step"], int(state["order_hash"], 16)

    def _identity(self) -> dict[str, Any]:
        order = self._given["order"]
        return {
            "store": self._store.meta.digest, "hooks": str(self._hooks),
            "batch": self.batch, "seed": self._given["seed"], "rank": self._given["rank"],
            "world": self._given["world"], "order": [order.lanes, order.window, order.round_units],
        }  # fmt: skip
