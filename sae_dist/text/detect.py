"""Detects the kind of text at a path, by file names and first bytes."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.text import local_files, reading

_KINDS = {
    ".txt": "files",
    ".md": "files",
    ".rst": "files",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_TABLES_AND_MARKUP = (".csv", ".tsv", ".html", ".htm", ".xml")
_LOOKED_INTO = 8  # files of a plain-text folder that are checked for JSON lines


class DetectedText(NamedTuple):
    """The configuration that reads a path: the kind, and `text.suffixes` where the defaults do not fit."""

    kind: str
    suffixes: tuple[str, ...] = ()


def detect(path: str) -> DetectedText:
    """How to read the text at `path`; UserError when it is not text, or text of several kinds.

    If nothing exists there, `owner/name` is a Hugging Face dataset; anything else is judged by its name.
    """
    place = Path(path).expanduser()
    suffix = local_files.plain_name(place).suffix
    if "://" not in path and not os.path.exists(place):
        version = suffix[1:].isdigit()  # of a dataset's name, as in owner/name-1.0
        if (suffix and not version) or "/" not in path:
            return DetectedText("jsonl" if suffix == ".json" else _KINDS.get(suffix, "files"))
        return DetectedText("huggingface")
    place = local_files.located(path)
    return _folder(place, path) if place.is_dir() else DetectedText(_kind_of_file(place, path, suffix))


def _kind_of_file(file: Path, path: str, suffix: str) -> str:
    head = reading.first_bytes(file, file.name)
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return "parquet"
    reading.check_text(head, file.name)
    if suffix in _TABLES_AND_MARKUP:
        raise UserError(
            f"text={path} ends in {suffix}, which is not plain text; make it JSON lines or Parquet, or set "
            f"text=files text.path={path} to take it as it stands"
        )
    known = "jsonl" if suffix == ".json" else _KINDS.get(suffix, "files")
    return "jsonl" if known == "files" and _holds_json_lines(file) else known


def _folder(folder: Path, path: str) -> DetectedText:
    files = sorted(local_files.walk(folder))
    top = {file.name for file in files if file.parent == folder}
    if "dataset_dict.json" in top or {"state.json", "dataset_info.json"} <= top:
        return DetectedText("huggingface")  # what save_to_disk wrote
    suffixes = Counter(local_files.plain_name(file).suffix for file in files)
    kinds = sorted({_KINDS[suffix] for suffix in suffixes if suffix in _KINDS})
    if len(kinds) > 1:
        held = ", ".join(f"{n} {suffix}" for suffix, n in suffixes.items() if suffix in _KINDS)
        raise UserError(
            f"text={path} holds files of several kinds ({held}); say which of them are the text: "
            + " or ".join(f"text={kind} text.path={path}" for kind in kinds)
        )
    if kinds in ([], ["files"]):  # .json files count only where there is no other text: most of them are settings
        candidates = [file for file in files if local_files.suffix_of(file, tuple(_KINDS) if kinds else (".json",))]
        looked_into = candidates[:_LOOKED_INTO]
        if looked_into and all(map(_holds_json_lines, looked_into)):
            return DetectedText("jsonl", tuple(sorted({local_files.plain_name(file).suffix for file in candidates})))
    return DetectedText(kinds[0] if kinds else "files")


def _holds_json_lines(file: Path) -> bool:
    return reading.holds_json_lines(reading.first_bytes(file, file.name).decode("utf-8", "replace"))
