"""The main job killed, for real: kill -9 of the driver and of actors, SIGTERM; the dictionary is the same."""

import json
import signal

import psutil
import pytest

from tests.service.main_job import files, finish, has_checkpoint, order_hashes, start, units, wait_until


@pytest.fixture(autouse=True)
def _time_to_strike(monkeypatch):
    """The training waits after its first checkpoint: it takes two seconds in all, and could be over before the blow."""
    rule = {"point": "train.step", "where": {"step": 50}, "action": "sleep", "seconds": 4}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([rule]))


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda out: units(out) >= 6, id="while harvesting", marks=pytest.mark.slow),
        pytest.param(has_checkpoint, id="after a checkpoint"),
    ],
)
def test_kill_9_of_the_driver_and_the_same_command_end_in_the_same_dictionary(uninterrupted, tmp_path, moment):
    out = tmp_path / "killed"
    victim = start(out)
    wait_until(lambda: moment(out), victim)
    family = psutil.Process(victim.pid).children(recursive=True)
    family = [process for process in family if "Agent" not in process.name()]  # Ray's agents go some minutes later
    victim.kill()
    victim.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind: {[process.name() for process in alive]}"
    finish(start(out))
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")
    shared = order_hashes(out).items() & order_hashes(uninterrupted).items()
    assert len(shared) == len(order_hashes(uninterrupted))


def test_kill_9_of_actors_is_mended_within_the_run(uninterrupted, tmp_path):
    out = tmp_path / "actors"
    process = start(out, "train.keep_checkpoints=1")

    def kill(actor: str) -> None:
        found = [child for child in psutil.Process(process.pid).children(recursive=True) if actor in child.name()]
        for child in found:
            child.kill()
        assert found, f"no {actor} to kill"

    wait_until(lambda: units(out) >= 5, process)
    kill("ray::Replica")
    wait_until(lambda: has_checkpoint(out), process)
    kill("ray::Trainer")
    said = finish(process)
    assert "replica 0 died at unit" in said
    assert "the trainer died; a new one goes on from step_" in said
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")


def test_a_request_to_stop_saves_and_exits_75(uninterrupted, tmp_path):
    out = tmp_path / "stopped"
    process = start(out)
    wait_until(lambda: has_checkpoint(out), process)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in finish(process, 75)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    finish(start(out))
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")
