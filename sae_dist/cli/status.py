"""What a run is doing, or what came of it, from its files alone: no process is asked, so it works for dead runs too.

Example: sae-dist status runs/quickstart
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.cli.report import result_paths
from sae_dist.config import UserError, local_folder
from sae_dist.service.display import duration, lines
from sae_dist.service.run_folder import is_claimed, read_status
from sae_dist.service.summary import read_summary

POSITIONAL = ("out",)
FIGURES = ("tokens", "fvu", "l0", "dead_fraction", "loss_recovered")


def main(values: Mapping[str, Any]) -> int:
    out = Path(local_folder("out", values["out"]))
    status = read_status(out)
    if status is None:
        raise UserError(f"out={out} holds no run (no status.json); `ls runs` shows what there is")
    state = status["state"]
    if not is_claimed(out) and state not in ("done", "stopped", "refused", "failed"):
        state = f"dead while {state}; the same command goes on from here"
    print(
        f"{out}: {state}  (work {duration(status['wall_seconds'])}, said {duration(time.time() - status['time'])} ago)"
    )
    if note := status.get("note"):
        print(f"  {note}")
    for phase in ("text", "harvest", "train"):
        for line in lines(phase, status.get(phase, {})):
            print(f"  {line}")
    if state == "done" and "step" in status:
        print("\n".join(f"  {line}" for line in _finished(read_summary(out))))
    return 0


def _finished(summary: Mapping[str, Any]) -> list[str]:
    """The figures of a finished training, what is wrong with them, and where its parts are."""
    trained = {"steps": summary["steps"], "tokens": summary["tokens_trained"], "latents": summary["n_latents"]}
    found = lines("trained", trained | {"tokens_per_second": summary["tokens_per_second"]})
    judged = [("held out", summary["eval"]), *((one["name"], one["eval"]) for one in summary.get("also", []))]
    for name, own in judged:
        found += lines(name, {key: own[key] for key in FIGURES if own.get(key) is not None})
    found += [f"ALERT: {alert}" for alert in summary.get("alerts", [])]
    return found + result_paths(summary)
