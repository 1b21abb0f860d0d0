"""Progress in the log: by a clock that is turned by hand."""

import logging

from sae_dist import progress


def test_a_line_every_few_seconds_says_what_is_done_and_the_time_that_is_left(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        worked = []
        for unit in progress.logged(range(100), "imported", 100):
            now += 2.0
            worked.append(unit)
    assert worked == list(range(100))
    assert caplog.messages[:2] == ["imported 3 of 100 units, 3:14 left", "imported 6 of 100 units, 3:08 left"]
    assert len(caplog.messages) == 33  # after 6, 12, ... 198 seconds


def test_short_work_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        assert list(progress.logged([1, 2, 3], "copied", 3)) == [1, 2, 3]
    assert not caplog.messages
