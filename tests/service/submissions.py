"""What `sae-dist submit` makes of a command line, as its user sees it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from sae_dist.cli.main import main

TRAIN = ("train", "store=mine", "out=runs/mine", "sae.n_latents=64", "sae.k=4")


def shown(capsys: Any, *words: str) -> str:
    """What dry_run=true prints."""
    code = main(["submit", *words, "dry_run=true"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def shown_json(capsys: Any, *words: str) -> dict[str, Any]:
    return json.loads(shown(capsys, *words))


def refused(capsys: Any, *words: str) -> str:
    """The one line with which it ends."""
    code = main(["submit", *words])
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1), said
    return lines[0]


def said(capsys: Any, command: str, *words: str, code: int = 0) -> str:
    """What `sae-dist submit` or `jobs` says."""
    ended = main([command, *words])
    found = capsys.readouterr()
    assert ended == code, found
    return found.out + found.err


def stand_in(folder: Path, name: str, body: str) -> None:
    """A command of somebody else's that this machine has not."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def run_script(script: str, bin: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A batch script, with stand-ins before everything that the machine has."""
    script = script.replace("export PATH=", f"export PATH={bin}:", 1)
    return subprocess.run(["bash"], input=script, text=True, env=os.environ | variables, capture_output=True)
