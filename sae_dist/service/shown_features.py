"""Feature data of the runs in a shown folder: its pages, and what these ask for.

The pages are those of a static site, with another source.js: it asks here what the static one reads from data files.
Files are opened as all others that are shown, so no link is followed, and none of them can be read as a whole.
"""

import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import pyarrow as pa

from sae_dist.config import UserError
from sae_dist.interpret import site
from sae_dist.interpret.feature_answers import FeatureAnswers, query_of
from sae_dist.interpret.features import ABOUT
from sae_dist.interpret.read_features import FEATURES, Features, OpenFile
from sae_dist.interpret.read_labels import FOLDER as LABELS
from sae_dist.interpret.read_labels import TABLE as LABEL_TABLE
from sae_dist.service.shown_folder import RUN_FILES, ShownFile, ShownFolder
from sae_dist.service.web_server import TYPES, Made, content_type
from sae_dist.storage import StorageError

KEPT = 4  # runs whose index stays in memory
MARKS = {FEATURES: RUN_FILES, LABELS: RUN_FILES}
SOURCE = "source.js"
NUMBER = r"0|[1-9][0-9]{0,9}"


class _Kept(NamedTuple):
    tags: tuple[str, str]  # of the files that change with the data
    answers: FeatureAnswers


class ShownFeatures:
    """Answers to paths below `features/` of a run. For several threads."""

    def __init__(self, folder: ShownFolder) -> None:
        self._folder, self._lock, self._kept = folder, threading.Lock(), dict[tuple[str, ...], _Kept]()
        self._files = {path.name: path.read_bytes() for path in site.STATIC.iterdir()}
        self._files[SOURCE] = (site.SERVED / SOURCE).read_bytes()

    def __call__(self, parts: Sequence[str], asked: str) -> Made | None:
        """`parts` of a path, `asked` the rest of the address; None where no feature data is meant."""
        for at, part in enumerate(parts[:-1]):
            if part == FEATURES and self.has(parts[:at]):
                return self._answer(parts[:at], parts[at + 1 :], asked)
        return None

    def has(self, run: Sequence[str]) -> bool:
        """Whether a run has feature data."""
        return bool(self._tag(run, FEATURES, ABOUT))

    def read_ahead(self, run: Sequence[str]) -> None:
        """Reads what the first list of a run's latents would wait for; UserError as that list would say it."""
        self._answers(run).overview()

    def _answer(self, run: Sequence[str], rest: Sequence[str], asked: str) -> Made | None:
        name = "/".join(rest) or "index.html"
        if name in self._files:
            return Made(HTTPStatus.OK, self._files[name], content_type(name))
        if rest[0] != "data":
            return None
        try:
            return self._value(self._answers(run), rest[1:], dict(parse_qsl(asked, keep_blank_values=True)))
        except StorageError:
            raise
        except UserError as wrong:
            return _said(HTTPStatus.BAD_REQUEST, str(wrong))

    def _value(self, answers: FeatureAnswers, what: Sequence[str], fields: Mapping[str, str]) -> Made | None:
        """What is asked for, as JSON."""
        match what:
            case ["facts"]:
                return _json(answers.facts())
            case ["overview"]:
                return _json(answers.overview())
            case ["selection"]:
                return _json(answers.selection(query_of(fields)))
            case ["rows"]:
                return _json(answers.rows(query_of(fields), _number(fields, "from"), _number(fields, "to")))
            case ["latents" | "row" | "walk" as kind, number] if re.fullmatch(NUMBER, number):
                n_latents, latent = answers.found.n_latents, int(number)
                if latent >= n_latents:
                    said = f"There is no latent {latent}: the dictionary has 0 to {n_latents - 1}."
                    return _said(HTTPStatus.NOT_FOUND, said)
                if kind == "walk":
                    return _json(answers.walk(query_of(fields), latent))
                return _json(answers.latent(latent) if kind == "latents" else answers.row(latent))
        return None

    def _answers(self, run: Sequence[str]) -> FeatureAnswers:
        """Those of a run, made again once its files are others."""
        tags = (self._tag(run, FEATURES, ABOUT), self._tag(run, LABELS, LABEL_TABLE))
        with self._lock:
            kept = self._kept.pop(tuple(run), None)
            if kept is None or kept.tags != tags:
                found = Features(Path(*run, FEATURES), self._opener(run))
                kept = _Kept(tags, FeatureAnswers(found, run[-1] if run else self._folder.uri.rpartition("/")[2]))
            self._kept[tuple(run)] = kept  # the last ones used are the last ones here
            while len(self._kept) > KEPT:
                self._kept.pop(next(iter(self._kept)))
        return kept.answers

    def _tag(self, run: Sequence[str], kind: str, name: str) -> str:
        """Another one once the file is another; "" where there is none."""
        with self._folder.open([*run, kind, name], MARKS) as file:
            return "" if file is None else file.tag

    def _opener(self, run: Sequence[str]) -> OpenFile:
        @contextmanager
        def open_file(kind: str, name: str) -> Iterator[pa.NativeFile]:
            with self._folder.open([*run, kind, name], MARKS) as file:
                if file is None:
                    raise FileNotFoundError("it is missing")
                yield pa.PythonFile(_Reader(file), mode="r")

        return open_file


class _Reader(io.RawIOBase):
    """A shown file as Python's files are."""

    def __init__(self, file: ShownFile) -> None:
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._file.size - self._at), 0)
        data = memoryview(self._file.read(self._at, length) if length else b"")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _number(fields: Mapping[str, str], name: str) -> int:
    if re.fullmatch(NUMBER, fields.get(name, "")) is None:
        raise UserError(f"{name}={fields.get(name, '')} is no number of a row")
    return int(fields[name])


def _json(value: Any) -> Made:
    return Made(HTTPStatus.OK, site.as_json(value).encode(), TYPES[".json"])


def _said(status: HTTPStatus, text: str) -> Made:
    return Made(status, f"{text}\n".encode(errors="replace"), TYPES[".txt"])
