"""Requests to stop: what counts as one, and a terminal that is closed."""

import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sae_dist.cli.main import main
from sae_dist.config import Stopped
from sae_dist.service import signals
from sae_dist.service.signals import catch_signals
from tests.service.main_job import DEADLINE_S, has_checkpoint

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_that_interrupts_nothing(number):
    before = signal.getsignal(number)
    with catch_signals() as request:
        os.kill(os.getpid(), number)
        assert request.made()
        with pytest.raises(Stopped, match=number.name):
            request.check()
    assert signal.getsignal(number) == before


def test_the_same_signal_to_a_process_and_to_its_group_is_one_request():
    """As GNU timeout sends it."""
    with catch_signals() as request:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert request.made()


def test_a_request_is_heard_where_the_signal_was_blocked_for_others():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with catch_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.made()


def test_a_second_ctrl_c_ends_the_wait(monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_S", 0.0)
    with catch_signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_closed_terminal_is_no_request():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.made()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_whose_terminal_is_closed_saves_and_goes_on_when_repeated(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((2000, 16), np.float32))
    assert main(["store", "import", f"path={tmp_path}/rows.npy", f"store={tmp_path}/store"]) == 0
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "sae_dist", "train", f"store={tmp_path}/store", f"out={out}", "sae.n_latents=32",
        "sae.k=2", "train.steps=1000000", "train.batch=64", "train.init_rows=256", "train.checkpoint_every=1000000",
        "train.log_every=1", "wandb.mode=disabled",
    ]  # fmt: skip
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))  # fmt: skip
    os.close(theirs)
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + DEADLINE_S
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        os.set_blocking(ours, False)
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(ours)  # the kernel sends SIGHUP to whose terminal this is
    assert process.wait(timeout=DEADLINE_S) == 75
    assert has_checkpoint(out)
