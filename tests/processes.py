"""Processes of a test's own: forked from a server that has imported once what is slow to import."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(  # one list: each call replaces the list before
    ["tests.conftest", "tests.shards.children", "tests.train.parallel.loop_ranks", "tests.train.parallel.mesh_steps"]
)
