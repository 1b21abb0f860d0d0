"""What a run is doing, from its files alone: no process is asked, so it works for finished and for dead runs too.

Example: sae-dist status runs/quickstart
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import UserError
from sae_dist.service.display import duration, lines
from sae_dist.service.run_folder import is_claimed, read_status

POSITIONAL = ("out",)


def main(values: Mapping[str, Any]) -> int:
    out = Path(values["out"])
    status = read_status(out)
    if not status:
        raise UserError(f"out={out} holds no run (no status.json); `ls runs` shows what there is")
    state = str(status["state"])
    if not is_claimed(out) and state not in ("done", "stopped", "refused", "failed"):
        state = f"dead while {state}; the same command goes on from here"
    print(
        f"{out}: {state}  (work {duration(status['wall_seconds'])}, said {duration(time.time() - status['time'])} ago)"
    )
    if status.get("note"):
        print(f"  {status['note']}")
    for phase in ("text", "harvest", "train"):
        if phase in status:
            print("\n".join(f"  {line}" for line in lines(phase, status[phase])))
    return 0
