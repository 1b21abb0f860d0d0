"""A sweep's report in Weights & Biases: one run with its tables and plots.

A process of its own sends it: whatever becomes of that, the sweep has its report on disk.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from sae_dist.monitor.config import WandbConfig
from sae_dist.monitor.tracked import TrackedRun
from sae_dist.monitor.tracker_process import wandb_options

logger = logging.getLogger(__name__)
TIMEOUT_S = 120.0  # to begin, to take the files, and to end


def send_report(report: Path, run: TrackedRun, wandb: WandbConfig, *, out: Path) -> str:
    """Gives W&B what lies in the folder `report`; why it did not take it, empty where it did. `out`: for its files."""
    order = {"report": str(report), "run": run._asdict(), "options": wandb_options(wandb, out)}
    with (out / "wandb.log").open("ab") as log:
        log.write(b"a report\n")
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__], input=json.dumps(order).encode(), stdout=log, stderr=log,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it was not done after {TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return ""
    return (out / "wandb.log").read_text(errors="replace").rstrip().rpartition("\n")[2].strip()


def main() -> None:
    """What it is to send comes as one JSON object on standard input."""
    import wandb

    from sae_dist.monitor.wandb_tracker import WandbTracker

    order = json.load(sys.stdin)
    report, tracker = Path(order["report"]), WandbTracker(**order["options"])
    tables = json.loads((report / "points.json").read_text(encoding="utf-8"))["tables"]
    shown: dict[str, Any] = {}
    for name, rows in tables.items():
        if rows:
            columns: Any = list(dict.fromkeys(key for row in rows for key in row))
            cells: Any = [[row.get(key) for key in columns] for row in rows]
            shown[f"tables/{name}"] = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
    for plot in sorted((report / "plots").glob("*.svg")):
        shown[f"plots/{plot.stem}"] = wandb.Html(plot.read_text(encoding="utf-8"), inject=False)
    tracker.show(TrackedRun(**order["run"]), shown)
    tracker.flush()
    tracker.close()


if __name__ == "__main__":
    main()
