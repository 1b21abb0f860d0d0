"""Answers of a language model on disk, so that nothing is asked twice, whatever stopped the work."""

import json
import logging
import threading
from pathlib import Path

from sae_dist.config import UserError

logger = logging.getLogger(__name__)


class Answers:
    """A JSON line for each answer, appended as it arrives. May be used from several threads, by one process."""

    def __init__(self, path: Path) -> None:
        """UserError where the file is something else. What a killed process wrote of its last line is dropped."""
        self._known: dict[str, str] = {}
        self._writing = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                one = json.loads(line)
                self._known[one["question"]] = str(one["answer"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged in line {number}; remove that line, or the file") from None
        if self._known:
            logger.info("%s has %s answers, which are not asked for again", path, f"{len(self._known):,}")

    def get(self, question: str) -> str | None:
        return self._known.get(question)

    def keep(self, question: str, answer: str) -> None:
        line = json.dumps({"question": question, "answer": answer}) + "\n"
        with self._writing:
            self._file.write(line.encode())
            self._file.flush()
            self._known[question] = answer

    def close(self) -> None:
        self._file.close()
