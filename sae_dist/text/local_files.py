"""Text files on a local disk: finding them, and a fingerprint of their content."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import xxhash

from sae_dist.config import UserError, digest
from sae_dist.text.reading import read_errors

COMPRESSION = (".gz", ".bz2", ".xz", ".zst")
HASHED_BYTES = 4 << 30  # a larger corpus is identified by sizes and times: hashing it would take too long
# folders of runs and stores beside the text, with their logs and records, are not text
_OWN_FOLDERS = ({"config.yaml", "status.json"}, {"store.json"})


def find(path: str, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of every file at `path`, by name; a folder is searched recursively for `suffixes`.

    Hidden files and the folders of runs and stores are skipped. Names start at the folder's own name, so that they do
    not change when the corpus is moved.
    """
    root = located(path)
    if not root.is_dir():
        return [(root.name, root)]
    base = root.resolve()
    files = list(walk(base))
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found = [(f"{base.name}/{file.relative_to(base).as_posix()}", file) for file in files if suffix_of(file, wanted)]
    if not found:
        there = Counter(plain_name(file).suffix or file.name for file in files).most_common(5)
        held = f"; it has {', '.join(f'{n} {suffix}' for suffix, n in there)}" if there else ""
        raise UserError(
            f"text.path={path!r} has no file that ends in {', '.join(suffixes)}{held}; set text.suffixes=[...], or "
            "text=jsonl, text=parquet for other kinds of files"
        )
    return sorted(found)


def located(path: str) -> Path:
    """`path` as a Path; UserError unless it is an existing file or folder."""
    if "://" in path:
        raise UserError(f"text.path={path!r} is an address; text is read from local files: fetch it first")
    root = Path(path).expanduser()
    if not path or not os.path.exists(root):  # unlike Path.exists, False for a name too long for any file
        raise UserError(f"text.path={path!r} does not exist; give a local file or folder: text.path=FOLDER")
    if not root.is_dir() and not root.is_file():
        raise UserError(f"text.path={path!r} is neither a file nor a folder; text is read more than once: give a file")
    return root


def walk(base: Path) -> Iterator[Path]:
    """The files below `base` that may be text; links to folders are not followed."""
    for folder, below, names in os.walk(base, onerror=_unreadable_folder):
        if Path(folder) != base and any(own <= set(names) for own in _OWN_FOLDERS):
            below.clear()
            continue
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _unreadable_folder(error: OSError) -> NoReturn:
    raise UserError(f"text folder {error.filename} cannot be read ({error.strerror}); make it readable or move it out")


def plain_name(file: Path) -> Path:
    """The file's name in lower case, without the suffix of a compression."""
    name = Path(file.name.lower())
    return name.with_suffix("") if name.suffix in COMPRESSION else name


def suffix_of(file: Path, suffixes: Sequence[str]) -> str:
    """The one of `suffixes` that the name ends in, compressed or not; empty if none."""
    ends = (file.name.lower(), plain_name(file).name)
    return next((suffix for suffix in suffixes if any(end.endswith(suffix) for end in ends)), "")


def fingerprint(files: Sequence[tuple[str, Path]]) -> str:
    """Digest of names and contents; beyond 4 GiB, of names, sizes and modification times."""
    stats = [file.stat() for _, file in files]
    if sum(stat.st_size for stat in stats) > HASHED_BYTES:
        return digest([(name, stat.st_size, stat.st_mtime_ns) for (name, _), stat in zip(files, stats, strict=True)])
    return digest([(name, _content_hash(file, name)) for name, file in files])


def _content_hash(path: Path, name: str) -> str:
    state = xxhash.xxh3_128()
    with read_errors(name), path.open("rb") as binary:
        while block := binary.read(1 << 20):
            state.update(block)
    return state.hexdigest()
