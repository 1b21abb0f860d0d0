"""Trainings that are stopped and begun again."""

import pytest

from sae_dist.config import Stopped
from sae_dist.train import loop
from sae_dist.train.task import Task


def train_with_stops(task: Task, *stops: int) -> None:
    """Trains to the end; each attempt but the last is asked to stop after so many looks."""
    for at in stops:
        done = iter(range(10_000))
        with pytest.raises(Stopped):
            loop.train(task, log=lambda *_: None, stop=lambda at=at, done=done: next(done) >= at)
    loop.train(task, log=lambda *_: None)
