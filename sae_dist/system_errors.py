"""Errors of the operating system as one line with the cure: full or read-only disk, no permission, no memory."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_dist.config import UserError

CURES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free space there, or choose another place, and repeat the command",
    (errno.EROFS, errno.EACCES, errno.EPERM): "choose a place that this user may read and write",
    (errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ELOOP, errno.ENAMETOOLONG): "choose another place",
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT): "look after that disk, and repeat the command",
    (errno.EMFILE, errno.ENFILE): "raise `ulimit -n`, and repeat the command",
}
CURE_OF = {number: cure for numbers, cure in CURES.items() for number in numbers}
NO_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "out of memory", "can't start new thread")
MEMORY_CURE = (
    "give the command more memory, or lower sae.n_latents, train.batch or train.micro_batch, evaluate.batch_rows or "
    "harvest.batch_memory_gb; `sae-dist plan` says what a run needs"
)


def user_error(error: BaseException) -> UserError | None:
    """`error` as a UserError if a disk, a permission or memory is the cause; else None."""
    if isinstance(error, OSError) and error.errno in CURE_OF:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(f"{where}{error.strerror}; {CURE_OF[error.errno]}")
    full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if full or isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY_WORDS):
        amount = re.search(r"(tried to|Unable to) allocate [\d.]+ \w+", str(error))
        return UserError(f"too little memory{f' ({amount[0]})' if amount else ''}; {MEMORY_CURE}")
    return None


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Adds the name of the file to an OSError that has none, as those of `write` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
