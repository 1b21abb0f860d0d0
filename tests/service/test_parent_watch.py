"""A process that ends with its parent, whoever inherits it."""

import subprocess
import sys

import psutil

CHILD = """
import time
from sae_dist.service.parent_watch import exit_with_parent
exit_with_parent()
print("up")
time.sleep(60)
"""
PARENT = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-uc', {CHILD!r}]); print(p.pid); p.wait()"


def test_a_process_ends_soon_after_its_parent_was_killed():
    with subprocess.Popen([sys.executable, "-uc", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "up\n" and child.is_running()
        parent.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
