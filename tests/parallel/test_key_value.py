"""Where processes meet: what strangers can do there (nothing), and that it is a store as torch wants one."""

import contextlib
import random
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import DistStoreError

from sae_dist.parallel.key_value import PrefixedStore, StoreAddress, StoreClient, StoreServer
from tests.processes import PROCESSES


@pytest.fixture
def served():
    served = StoreServer("127.0.0.1")
    yield served
    served.close()


def test_it_keeps_what_is_said(served):
    other = PrefixedStore(StoreClient(served.address, 10), "a")
    other.set("x", bytes(range(256)))
    assert PrefixedStore(served, "a").get("x") == served.get("a/x") == bytes(range(256))
    assert (other.add("n", 2), other.add("n", -5), served.add("a/n", 1)) == (2, -3, -2)
    assert other.check(["x", "n"]) and not other.check(["x", "y"])
    assert other.compare_set("x", "no", "new") == bytes(range(256))
    assert other.compare_set("y", "", "new") == b"new" == served.get("a/y")
    assert other.delete_key("x") and not other.delete_key("x") and not served.check(["a/x"])


def test_a_word_that_is_waited_for_comes_or_its_absence_is_an_error(served):
    ours, theirs = StoreClient(served.address, 10), StoreClient(served.address, 10)
    threading.Timer(0.2, theirs.set, ("late", "word")).start()
    assert ours.get("late") == b"word"
    with pytest.raises(DistStoreError, match="nobody set never within 0 s"):
        ours.wait(["late", "never"], timedelta(seconds=0.1))
    assert ours.get("late") == b"word"  # the connection goes on


def test_who_does_not_know_the_secret_is_refused_and_disturbs_nobody(served):
    """A wrong secret, noise, silence."""
    friend, place = StoreClient(served.address, 10), served.address
    friend.set("pulse", "sound")
    with pytest.raises(DistStoreError, match="out of reach"):
        StoreClient(place._replace(secret="0" * 64), 5)
    chance = random.Random(0)
    silent = [socket.create_connection(place[:2]) for _ in range(20)]
    for _ in range(50):
        with socket.create_connection(place[:2]) as stranger:
            stranger.sendall(chance.randbytes(chance.choice((1, 32, 68, 500))))
    assert friend.get("pulse") == b"sound"
    for each in silent:
        each.close()


@pytest.mark.parametrize("harm", [lambda sent: sent + sent, lambda sent: sent[:-2] + b"x]"], ids=["twice", "changed"])
def test_a_message_that_is_repeated_or_changed_on_its_way_ends_the_connection(served, harm):
    """Between the two sides is somebody who hears all and does not know the secret."""
    between = socket.create_server(("127.0.0.1", 0))
    harmful = threading.Event()

    def pass_on() -> None:
        ours, _ = between.accept()
        theirs = socket.create_connection(served.address[:2])
        with ours, theirs:
            answers = threading.Thread(target=copy, args=(theirs, ours, lambda data: data))
            answers.start()
            copy(ours, theirs, lambda data: harm(data) if harmful.is_set() else data)
            answers.join()

    def copy(source: socket.socket, to: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                to.sendall(change(data))
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)

    passing = threading.Thread(target=pass_on)
    passing.start()
    victim = StoreClient(served.address._replace(port=between.getsockname()[1]), 10)
    victim.set("x", "right")
    harmful.set()
    with pytest.raises(DistStoreError, match="is gone"):
        for _ in range(10):
            victim.add("n", 1)
    assert served.get("x") == b"right" and served.add("n", 0) <= 1
    passing.join()
    between.close()


def test_the_secret_is_not_in_what_is_printed(served):
    assert served.address.secret not in f"{served.address} {served.address!r} {[served.address]}"


def rank_of(place: StoreAddress, rank: int) -> None:
    torch.set_num_threads(1)
    store = StoreClient(place, 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    pair = dist.new_group([0, 2])
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    if rank != 1:
        dist.all_reduce(x, group=pair)
    dist.barrier()
    store.set(f"sum/{rank}", str(x.item()))
    dist.destroy_process_group()


def test_processes_that_meet_there_compute_together(served):
    ranks = [PROCESSES.Process(target=rank_of, args=(served.address, rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [served.get(f"sum/{rank}") for rank in range(3)] == [b"6.0", b"3.0", b"6.0"]
