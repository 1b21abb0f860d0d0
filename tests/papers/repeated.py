"""A repeated paper as a person types it, twice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def twice(paper: str, out: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The figures and the page of its miniature; the second run finds all stages done, and ends in the same page."""
    command = [sys.executable, "-m", f"benchmarks.{paper}", "--size", "miniature", "--out", str(out), *words]
    pages = []
    for _ in range(2):
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr[-3000:]
        pages.append((out / "page/index.html").read_text())
    assert pages[0] == pages[1]
    return json.loads((out / "study.json").read_text()), pages[0]
