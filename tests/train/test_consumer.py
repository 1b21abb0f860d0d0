"""What the store knows of a training: how far it is, and what it may still need."""

import time
from contextlib import closing
from pathlib import Path

import pytest

from sae_dist import storage
from sae_dist.shards.consumers import ConsumerPosition, positions
from sae_dist.train import consumer
from sae_dist.train.consumer import Consumer, consumer_name


@pytest.fixture
def place(tmp_path):
    return storage.open(str(tmp_path))


def test_it_is_known_from_its_start_until_it_signs_off(place):
    training = Consumer(place, "a", taken=0)
    assert positions(place) == [ConsumerPosition("a", 0, 0)]
    training.sign_off()
    assert positions(place) == []


def test_a_checkpoint_is_told_at_once_and_steps_now_and_then(place, monkeypatch):
    monkeypatch.setattr(consumer, "REPORT_EVERY_S", 3600.0)
    training = Consumer(place, "a", taken=0)
    training.take(3)
    assert positions(place) == [ConsumerPosition("a", 0, 0)]
    training.save(2)
    assert positions(place) == [ConsumerPosition("a", 3, 2)]


def test_what_was_taken_is_told_while_the_training_waits_for_rows(place, monkeypatch):
    """Nobody calls it any more: producers would wait for it to have read what they made, and it for what they make."""
    monkeypatch.setattr(consumer, "REPORT_EVERY_S", 0.01)
    with closing(Consumer(place, "a", taken=0)) as training:
        training.take(4, starved_s=1.5)
        while positions(place) != [ConsumerPosition("a", 4, 0, 1.5)]:
            time.sleep(0.01)


def test_it_never_goes_back(place):
    with closing(Consumer(place, "a", taken=5)) as training:
        training.save(4)
        training.take(4)
        training.save(3)
    assert positions(place) == [ConsumerPosition("a", 5, 4)]


def test_a_store_that_cannot_be_written_costs_a_warning(place, tmp_path, caplog):
    (tmp_path / "consumers").write_text("in the way")
    with closing(Consumer(place, "a", taken=0)) as training:
        training.save(0)
    assert "does not take the report of consumer a" in caplog.text


def test_the_name_is_readable_the_same_every_time_and_no_other_runs():
    assert consumer_name(Path("/runs/my run")) == consumer_name(Path("/runs/my run"))
    assert consumer_name(Path("/runs/my run")).startswith("my-run-")
    assert consumer_name(Path("/runs/a")) != consumer_name(Path("/other/a"))
