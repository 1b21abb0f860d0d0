"""A lock between processes: one holder at a time, the others wait and say so."""

import subprocess
import sys
import threading

from sae_dist.locks import file_lock

HOLDER = """
import sys, time
from pathlib import Path
from sae_dist.locks import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_waited_for_with_a_message_and_free_when_its_holder_is_killed(tmp_path, caplog):
    path, entered = tmp_path / "lock", threading.Event()

    def enter() -> None:
        with file_lock(path, waiting="waiting for another one"):
            entered.set()

    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiter = threading.Thread(target=enter)
        waiter.start()
        assert not entered.wait(0.2)
        holder.kill()
        assert entered.wait(30)
        waiter.join()
    assert [record.message for record in caplog.records] == [f"waiting for another one (lock {path})"]


def test_a_free_lock_is_taken_without_a_message(tmp_path, caplog):
    with file_lock(tmp_path / "lock", waiting="waiting"):
        pass
    assert not caplog.records
