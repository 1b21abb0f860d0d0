"""Two replicas against one: the harvest command itself, Ray and all, on the same tokens.

One replica with a thread, one with all cores, and two with a thread each, in turn; a store of its own every time. What
is compared is the steady state, read off the commits' own times: from when every replica had done a unit to when the
first of them may run out of units. Ray's start, tokenising and loading the models come before and are told apart.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT, UNIT_SEQUENCES = 128, 64  # the command's defaults
POSITIONS = CONTEXT * UNIT_SEQUENCES  # of a unit
DEPTH = 2  # units that a replica has at once: at the end some of them stand still


class Setup(NamedTuple):
    """How many replicas, and the threads of each."""

    replicas: int
    threads: int


class Steady(NamedTuple):
    """One run: positions a second once all replicas are at work, over so many units, and the seconds until then."""

    tokens_per_second: float
    units: int
    start_s: float


def compare(units: int, rounds: int, hook: str, model: str = "smollm2") -> dict[str, Any]:
    """Median rates of the three over `rounds`, the setups in an order that turns round, and their ratios."""
    cores = os.cpu_count() or 1
    setups = {"one, a thread": Setup(1, 1), "one, all cores": Setup(1, cores), "two, a thread each": Setup(2, 1)}
    runs: dict[str, list[Steady]] = {name: [] for name in setups}
    for round_ in range(rounds):
        for name in list(setups) if round_ % 2 == 0 else reversed(list(setups)):
            runs[name].append(harvest(setups[name], units=units, hook=hook, model=model))
            sys.stderr.write(f"{name}: {runs[name][-1]}\n")
    rate = {name: statistics.median(run.tokens_per_second for run in own) for name, own in runs.items()}
    one, whole, two = rate.values()
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
        "two against one with a thread": round(two / one, 3),
        "two against one with all cores": round(two / whole, 3),
        "seconds before": {name: round(statistics.median(run.start_s for run in own), 1) for name, own in runs.items()},
        "units": units,
        "runs": {name: [run._asdict() for run in own] for name, own in runs.items()},
    }


def harvest(setup: Setup, *, units: int, hook: str, model: str) -> Steady:
    """Runs the command to its end; RuntimeError when it fails, or when it was never in a steady state."""
    with tempfile.TemporaryDirectory(prefix="replicas-") as place:
        folder = Path(place)
        command = [
            sys.executable, "-m", "sae_dist", "harvest", f"model={model}", f"hook={hook}", f"store={folder}/store",
            f"out={folder}/out", f"harvest.tokens={units * POSITIONS}", f"harvest.heldout_tokens={POSITIONS}",
            f"harvest.context={CONTEXT}", f"harvest.unit_sequences={UNIT_SEQUENCES}",
            f"harvest.replicas={setup.replicas}", f"harvest.threads={setup.threads}", "wandb.mode=disabled",
        ]  # fmt: skip
        began, at_work = time.time(), None
        with (folder / "log").open("wb") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
        while driver.poll() is None:
            if at_work is None and all_at_work(folder / "out" / "status.json", setup.replicas):
                at_work = time.time()
            time.sleep(0.1)
        if driver.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {driver.returncode}: {(folder / 'log').read_text()}")
        commits = sorted(path.stat().st_mtime for path in (folder / "store" / "commit").glob("*.json"))
        ends = commits[: -DEPTH * setup.replicas]
        steady = [at for at in ends if at_work is not None and at >= at_work]
        if at_work is None or len(steady) < 2:
            raise RuntimeError(f"--units {units} is too few to see {setup.replicas} replicas at work; give more")
        return Steady(rate(steady), len(steady) - 1, round(at_work - began, 1))


def all_at_work(status: Path, replicas: int) -> bool:
    """Whether so many replicas have done a unit each, as the command's status.json has it."""
    if not status.is_file():
        return False
    facts = json.loads(status.read_text()).get("harvest", {})
    done = [value.get("units", 0) for key, value in facts.items() if key.startswith("replica ")]
    return sum(units >= 1 for units in done) >= replicas


def rate(commits: Sequence[float]) -> float:
    """Positions a second between the first and the last of these times, at each of which a unit was committed."""
    return (len(commits) - 1) * POSITIONS / (commits[-1] - commits[0])
