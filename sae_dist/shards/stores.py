"""Opens a store, whatever it is: rows of its own, or several stores that are read as one."""

from typing import NamedTuple

from sae_dist import storage as objects
from sae_dist.config import UserError
from sae_dist.shards import joined, records
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.joined import JoinedStore
from sae_dist.shards.reader import Store
from sae_dist.shards.records import CorruptData
from sae_dist.shards.slice_cache import SliceCache
from sae_dist.storage import Storage


class StoreRecord(NamedTuple):
    """The record in store.json."""

    name: str
    meta: StoreMeta
    digest: str


def open(storage: Storage, *, cache: SliceCache | None = None) -> Store:
    """The store at `storage`; `UserError` if there is none."""
    meta = _meta(storage)
    if not joined.digests(meta):
        return Store(storage, meta, cache=cache)
    # parts have rows of their own: a join among them does not have the digest that was joined
    places = {name: objects.open(uri) for name, uri in joined.addresses(storage, meta).items()}
    return JoinedStore(storage, meta, {name: Store(place, _meta(place), cache=cache) for name, place in places.items()})


def _meta(storage: Storage) -> StoreMeta:
    """What store.json says, verified."""
    try:
        record = records.read(storage, "store.json", f"{storage.uri}/store.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"store={storage.uri} holds no store.json; harvest or import into it first") from None
    named = records.checked(StoreRecord, record, f"{storage.uri}/store.json")
    if named.meta.digest != named.name:
        raise CorruptData(f"{storage.uri}/store.json names itself {named.name} but its content is {named.meta.digest}")
    return named.meta
