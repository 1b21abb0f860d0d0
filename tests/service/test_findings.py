"""What a person is told of a run, case by case."""

from typing import Any

import pytest

from sae_dist.service.findings import Checkpoint, Disk, findings
from sae_dist.service.run_progress import figures, progress
from sae_dist.service.run_status import RunStatus, rate

NOW = 10_000.0
CONFIG = {"out": "/runs/mine", "train": {"steps": 1000, "batch": 10}}
HARVEST = {"units": 3, "of": 10, "replicas": 1, "deaths": 0, "tokens_per_second": 500.0}


def lines(n: int = 20, every_s: float = 2.0, **figures: Any) -> list[dict[str, Any]]:
    """The newest lines of a training: ten steps each; a figure may be a function of the seconds since the first."""
    times = [every_s * number for number in range(n)]
    return [
        {
            "step": 10 * number + 10, "time": NOW - times[-1] + at, "tokens": 100 * number + 100,
            **{key: value(at) if callable(value) else value for key, value in figures.items()},
        }
        for number, at in enumerate(times)
    ]  # fmt: skip


def run(state: str = "running", *, claimed: bool | None = True, **changes: Any) -> RunStatus:
    """One that trains while its store is harvested, unless something else is said."""
    said = {"state": state, "time": NOW - 1, "changed": NOW - 1, "pid": 7, "host": "here", "wall_seconds": 99.0}
    said |= {"train": {}, "harvest": HARVEST} if state == "running" else {}
    given = {"config": CONFIG, "training": lines(), "harvest": [], "summary": None, "damage": ()} | changes
    return RunStatus("/runs/mine", NOW, claimed, said | given.pop("said", {}), **given)


def alone(**changes: Any) -> RunStatus:
    """One whose store is there already."""
    return run(said={"harvest": {}} | changes.pop("said", {}), **changes)


def harvest(**facts: Any) -> RunStatus:
    return run(said={"harvest": HARVEST | facts})


STARVED = lines(starved_seconds=lambda s: 0.6 * s)
HELD = [{"phase": "harvest", "time": NOW - at, "held_s": 9.0 - 0.9 * at} for at in (10, 0)]
LATE = [line | {"time": line["time"] - 300} for line in lines()]
COSTLY = {"alerts": {"cost": 5.0, "price_per_hour": 2.0}}
NO_UNIT = [{"phase": "harvest", "time": NOW - at, "units": 3, "of": 10, "held_s": 0.0} for at in (4000, 5)]
CASES = {  # what is so: a run, what is said of it, and what to do
    "starved": (run(training=STARVED), "waits for rows 60% of its time", "harvest.replicas"),
    "starved by the store": (alone(training=STARVED), "reading the store", "train.cache"),
    "held": (run(harvest=HELD), "held 90% of the time", "mesh.data"),
    "blocked": (harvest(**{"replica 0": {"blocked": 0.5}}), "replica 0 wait for storage up to 50%", "store="),
    "replicas die": (harvest(deaths=3), "replicas were lost: 3 died", "harvest.batch_memory_gb"),
    "replicas are silent": (harvest(expired=2), "2 gave no sign of life", "log"),
    "an alert": (harvest(alert="replica 1 is slow"), "ALERT: replica 1 is slow", ""),
    "an alert of the training": (run(training=lines(alert="step 7: a spike")), "ALERT: step 7: a spike", ""),
    "no unit": (run(harvest=NO_UNIT), "no unit has been committed for 4000 s", "whether the replicas live"),
    "cost": (run(config=CONFIG | COSTLY, training=lines(seconds=36_000.0)), "training has cost 20.00", ""),
    "dead latents": (run(training=lines(dead_fraction=0.5)), "50% of the latents are dead", "sae.dead_after_tokens"),
    "of another": (run(training=lines(**{"k64/dead_fraction": 0.5})), "k64: 50% of the latents", "sae.n_latents"),
    "bad steps": (run(training=lines(skipped_steps=4)), "4 bad steps were dropped", "lower train.lr"),
    "rolled back": (run(training=lines(roll_backs=1)), "rolled back", "lower train.lr"),
    "no step": (alone(training=LATE), "no step for 5:00", "see its log"),
    "no progress": (run("pages", said={"changed": NOW - 1800}), "no progress for 30:00 in writing pages", "its log"),
    "hung": (run(said={"time": NOW - 400}), "in status.json for 6:40, though process 7 on here", "stop it"),
    "silent": (run(claimed=None, said={"time": NOW - 400}), "nothing new for 6:40", "`sae-dist status /runs/mine` on"),
    "dead": (run(claimed=False), "killed while harvesting and training", "the same command trains anew"),
    "stopped": (run("stopped", said={"note": "SIGTERM"}), "stopped: SIGTERM", "the same command"),
    "no summary": (run("done", said={"step": 1000}), "summary.json is missing", "which writes it again"),
    "damage": (run(damage=("x.json is damaged: it is cut; repeat it",)), "x.json is damaged: it is cut", "repeat it"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_so_is_said_with_the_next_thing_to_do(case):
    of, what, do = CASES[case]
    found = findings(of)
    assert any(what in finding.what and do in finding.do for finding in found), found


def test_a_run_that_does_well_is_left_in_peace():
    well = lines(starved_seconds=lambda s: 0.01 * s, dead_fraction=0.01, skipped_steps=0, roll_backs=0)
    for good in (run(training=well), alone(training=well), run("preparing"), run("evaluate"), run("pages")):
        assert findings(good, checkpoint=Checkpoint(100, NOW), disk=Disk(10**12, 2 * 10**12)) == []


def test_the_disk_is_told_before_it_is_full():
    (found,) = findings(run(), disk=Disk(10**9, 10**12))
    assert "1.0 GB of 1000 GB are free" in found.what and "train.keep_checkpoints" in found.do


def test_a_checkpoint_is_where_a_run_resumes():
    (found,) = findings(
        run(claimed=False, said={"command": "sae-dist run", "directory": "/"}), checkpoint=Checkpoint(1500, 0)
    )
    assert (found.do, found.command) == ("the same command resumes at step 1,500", "cd / && sae-dist run")


def test_the_present_speed_is_not_the_mean_since_the_start():
    """A run that stood still for an hour and is now ten times as fast."""
    slow, fast = lines(10, every_s=20.0), lines(30)
    resumed = [line | {"time": line["time"] - 3600} for line in slow] + [
        line | {"step": line["step"] + 100, "tokens": line["tokens"] + 1000} for line in fast
    ]
    assert rate(resumed, "tokens") == pytest.approx(50)
    (train,) = [part for part in progress(alone(training=resumed)) if part.name == "train"]
    assert (train.done, train.of) == (400, 1000)
    assert train.eta_s == pytest.approx(120)
    assert rate(resumed[:1], "tokens") is None


def test_a_training_is_not_done_before_its_harvest():
    (harvest, train) = progress(run(harvest=[{"time": NOW - 10, "eta_s": 5000.0}]))
    assert harvest.eta_s == train.eta_s == pytest.approx(4990)
    assert (harvest.done, harvest.of, harvest.tokens_per_second) == (3, 10, 500)


def test_every_dictionary_has_its_figures():
    newest = figures(run(training=lines(fvu=0.5, l0=4.0, **{"k64/fvu": 0.25})))
    assert newest == {"main": {"fvu": 0.5, "l0": 4.0}, "k64": {"fvu": 0.25}}
