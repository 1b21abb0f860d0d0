"""Jobs of a real Slurm on two machines: whatever stops them, they come back and end in the same dictionary."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.service import namespaces, slurm_cluster
from tests.service.main_job import files, units
from tests.service.slurm_cluster import SlurmCluster
from tests.service.submissions import said

pytestmark = pytest.mark.slow
WAIT_S = 3600.0  # for one thing to happen, on a machine that has much else to do
NODES = 2
UNITS = 24  # of the run's harvest


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    why_not = namespaces.why_not() or slurm_cluster.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    # short: the path of a Unix socket has 107 characters at most
    with tempfile.TemporaryDirectory(prefix="sd-slurm", ignore_cleanup_errors=True) as folder:
        cluster = SlurmCluster(Path(folder), nodes=NODES, cpus=2)
        with closing(cluster), pytest.MonkeyPatch.context() as environment:
            environment.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
            environment.setenv("RAY_worker_niceness", "0")  # a busy machine would starve them until the time limit
            yield cluster


class Job:
    """A run that was submitted to Slurm."""

    def __init__(self, slurm: SlurmCluster, capsys: Any, out: Path, *words: str) -> None:
        self.slurm, self.out, self._capsys = slurm, out, capsys
        run = ("run", "preset=tiny", f"out={out}", "wandb.mode=disabled")
        self._words = (*run, "scheduler=slurm", f"nodes={NODES}", "cpus=2", *words)
        (self.number,) = re.findall(r"as job (\d+);", self.submit())

    def submit(self) -> str:
        return said(self._capsys, "submit", *self._words)

    @property
    def log(self) -> str:
        path = self.out / f"slurm-{self.number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def state(self) -> str:
        return self.slurm.facts(self.number)["JobState"]

    def restarts(self) -> int:
        return int(self.slurm.facts(self.number)["Restarts"])

    def wait_until(self, true: Callable[[], bool], otherwise: str) -> None:
        until = time.monotonic() + WAIT_S
        while not true():
            ended = (state := self.state()) in ("FAILED", "CANCELLED", "TIMEOUT")
            assert not ended and time.monotonic() < until, f"{otherwise}: {state}\n{self.log[-5000:]}"
            time.sleep(0.5)

    def finish(self) -> None:
        self.wait_until(lambda: self.state() == "COMPLETED", "it does not end")


def test_a_run_over_two_nodes_comes_back_after_signals_and_a_killed_batch_script(
    slurm, uninterrupted, tmp_path, capsys
):
    job = Job(slurm, capsys, tmp_path / "run", "time_limit=120")
    assert f"is there already: job {job.number}" in job.submit()
    listed = said(capsys, "jobs")
    assert re.search(rf"^ {job.number} run-run.*(pending|running)", listed, re.MULTILINE), listed
    job.wait_until(lambda: units(job.out) >= 2, "nothing was harvested")
    assert all(slurm.network.processes(machine, "raylet") for machine in slurm.machines)

    slurm.say("scancel", "--signal=TERM", job.number)
    job.wait_until(lambda: job.restarts() == 1, "it is not queued again")
    before = units(job.out)
    job.wait_until(lambda: units(job.out) > before, "it does not go on")

    scripts = [each for machine in slurm.machines for each in slurm.network.processes(machine, "slurm_script")]
    (batch,) = [each for each in scripts if (above := each.parent()) is not None and "slurmstepd" in above.name()]
    batch.kill()
    job.wait_until(lambda: job.restarts() == 2, "it is not queued again")

    job.finish()
    assert files(job.out / "dictionary") == files(uninterrupted / "dictionary")
    assert "is done already" in job.submit()


def test_a_time_limit_that_is_too_short_is_only_a_pause(slurm, uninterrupted, tmp_path, capsys, monkeypatch):
    """The harvest alone takes two minutes and a half, and of three half a one is kept for saving."""
    slow = {"point": "harvester.before_forward", "action": "sleep", "seconds": 150 / UNITS, "nth": 0}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([slow]))
    job = Job(slurm, capsys, tmp_path / "run", "time_limit=3", "save_s=30", "tries=50")
    job.finish()
    assert job.restarts() >= 1
    assert files(job.out / "dictionary") == files(uninterrupted / "dictionary")


def test_a_job_that_is_stopped_or_cancelled_stays_out_of_the_queue_and_goes_on_when_submitted(slurm, tmp_path, capsys):
    job = Job(slurm, capsys, tmp_path / "run", "time_limit=120")
    job.wait_until(lambda: units(job.out) >= 1, "nothing was harvested")
    assert "was asked to stop; it saves first" in said(capsys, "jobs", f"stop={job.number}")
    facts = slurm.facts(job.number)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0"), job.log[-3000:]
    again = Job(slurm, capsys, tmp_path / "run", "time_limit=120")
    again.wait_until(lambda: "try 1 of" in again.log, "it does not go on")
    slurm.say("scancel", again.number)
    until = time.monotonic() + WAIT_S
    while again.state() == "COMPLETING" and time.monotonic() < until:
        time.sleep(1)
    assert (again.state(), again.restarts()) == ("CANCELLED", 0)
