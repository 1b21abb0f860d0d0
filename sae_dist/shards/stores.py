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
    try:
        record = records.read(storage, "store.json", f"{storage.uri}/store.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"store={storage.uri} holds no store.json; harvest or import into it first") from None
    named = records.checked(StoreRecord, record, f"{storage.uri}/store.json")
    if named.meta.digest != named.name:
        raise CorruptData(f"{storage.uri}/store.json names itself {named.name} but its content is {named.meta.digest}")
    if not joined.digests(named.meta):
        return Store(storage, named.meta, cache=cache)
    parts = {name: _part(uri, cache) for name, uri in joined.addresses(storage, named.meta).items()}
    return JoinedStore(storage, named.meta, parts)


def _part(uri: str, cache: SliceCache | None) -> Store:
    """A part of a joined store. A join of joins is refused when it is made."""
    return open(objects.open(uri), cache=cache)
