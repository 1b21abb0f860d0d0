"""Every storage keeps the same promises, and S3 keeps them through everything that a network does."""

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards.memory_map import map_bytes
from sae_dist.storage import StorageError, Unavailable
from sae_dist.storage.s3 import S3Config, S3Storage

QUICK = S3Config(part_bytes=5 << 20, retry_s=5, pause_s=0.01, longest_pause_s=0.05, read_timeout_s=1)
BIG = bytes(range(256)) * (12 << 12)  # 12 MiB: three parts


@pytest.fixture
def s3(double):
    return S3Storage("bucket", "some/prefix", QUICK)


def test_what_is_written_is_read_whole_and_in_ranges(every_place):
    every_place.write("a/b.bin", BIG)
    every_place.write("a/empty", b"")
    assert bytes(every_place.read("a/b.bin")) == BIG
    assert bytes(every_place.read("a/b.bin", 1000, 7 << 20)) == BIG[1000 : 1000 + (7 << 20)]
    assert bytes(every_place.read("a/b.bin", len(BIG) - 3, 10)) == BIG[-3:]
    assert bytes(every_place.read("a/b.bin", len(BIG) + 3, 10)) == b""
    assert bytes(every_place.read("a/empty")) == b""
    assert every_place.size("a/b.bin") == len(BIG)
    every_place.write("a/b.bin", b"other")
    assert bytes(every_place.read("a/b.bin")) == b"other"


def test_every_read_and_write_is_counted(every_place):
    counts = [every_place.requests]
    for act in (
        lambda: every_place.write("x", b"1"), lambda: every_place.create("y", b"1"), lambda: every_place.read("x")
    ):  # fmt: skip
        act()
        counts.append(every_place.requests)
    assert counts == sorted(set(counts))


def test_listing_is_by_prefix_complete_and_sorted(every_place):
    keys = sorted(f"commit/{i:03d}" for i in range(120))
    for key in keys:
        every_place.write(key, b"x" * 3)
    every_place.write("other/1", b"")
    assert [entry.key for entry in every_place.list("commit/")] == keys
    assert [entry.key for entry in every_place.list("commit/00")] == keys[:10]
    assert len(list(every_place.list())) == 121
    assert {entry.size for entry in every_place.list("commit/")} == {3}
    assert list(every_place.list("nothing/")) == []


def test_missing_objects_and_deleting(every_place):
    with pytest.raises(FileNotFoundError):
        every_place.read("nothing")
    with pytest.raises(FileNotFoundError):
        every_place.read("nothing", 0, 10)
    assert not every_place.exists("nothing")
    every_place.delete("nothing")
    every_place.write("x", b"1")
    every_place.delete("x")
    assert not every_place.exists("x")


@pytest.mark.parametrize("key", ["a", "b", "c"])
def test_of_many_creators_one_wins(every_place, key):
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append((every_place.create(key, b"%d" % i), i))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [i for ok, i in won if ok]
    assert len(winners) == 1 and bytes(every_place.read(key)) == b"%d" % winners[0]


def test_the_probe_leaves_nothing(every_place):
    storage.check_conditional_create(every_place)
    assert list(every_place.list()) == []


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/../b", "", "a b", "a\nb", "a?b", "."])
def test_keys_that_are_not_plain_paths_are_refused(place, key):
    with pytest.raises(UserError, match="plain relative path"):
        place.write(key, b"")


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="choose a folder that this user may write"):
        storage.check_conditional_create(storage.open(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch, number):
    """As rclone mounts a bucket: ENOSYS; FAT says EPERM."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    place = storage.open(tmp_path)
    place.write("a", b"1")
    with pytest.raises(StorageError, match="has no hard links, .*; use s3:// for store= and train.checkpoints="):
        place.create("b", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_place_that_is_none_is_named():
    with pytest.raises(UserError, match="unknown scheme ftp"):
        storage.open("ftp://host/x")
    with pytest.raises(UserError, match="names no bucket"):
        storage.open("s3://")


@pytest.mark.parametrize("action", ["500", "503", "429", "reset", "cut", "lost", "lost500", "stall"])
def test_one_fault_of_any_kind_costs_one_more_request(double, s3, action):
    double.stall_s = 1.2
    s3.write("x", b"before")
    rules = [double.fail(action, method=method, times=1) for method in ("PUT", "GET", "LIST", "HEAD", "DELETE")]
    s3.write("y", b"data" * 1000)
    assert bytes(s3.read("y")) == b"data" * 1000
    assert [e.key for e in s3.list()] == ["x", "y"]
    assert s3.exists("y")
    s3.delete("y")
    assert not s3.exists("y")
    assert sum(rule.done for rule in rules) == 5
    spoiled = 5 if action != "cut" else 2  # only GET and LIST answer with a body that can be cut
    assert double.requests.total() == 7 + spoiled


@pytest.mark.parametrize("action", ["lost", "lost500"])
def test_a_creator_whose_answer_was_lost_knows_that_it_won(double, s3, action):
    double.fail(action, method="PUT", nth=1)
    assert s3.create("commit", b"attempt one")
    assert not s3.create("commit", b"attempt two")
    assert bytes(s3.read("commit")) == b"attempt one"


def test_a_creator_whose_request_was_lost_and_that_came_late_knows_that_it_lost(double, s3):
    double.fail("reset", method="PUT", nth=1)
    double.objects["bucket", "some/prefix/commit"] = (b"another", 0.0)
    assert not s3.create("commit", b"mine")


@pytest.mark.parametrize("action", ["500", "reset", "lost", "lost500"])
def test_uploads_in_parts_survive_faults_at_every_request(double, s3, action):
    for nth in range(1, 7):  # begin, three parts, complete
        rule = double.fail(action, method="PUT|POST", key="big", nth=nth, times=1)
        s3.write(f"big{nth}", BIG)
        double.rules.remove(rule)
        assert bytes(s3.read(f"big{nth}")) == BIG


def test_a_read_in_parts_repeats_only_the_part_that_failed(double, s3):
    s3.write("big", BIG)
    double.requests.clear()
    double.fail("cut", method="GET", nth=2)
    assert bytes(s3.read("big", 0, len(BIG))) == BIG
    assert double.requests["GET"] == 4  # three parts and one again: at most 1.5 times the bytes


def test_a_storm_of_refusals_is_weathered(double, s3):
    double.fail("503", share=0.3)
    for i in range(40):
        s3.write(f"k{i}", b"%d" % i)
    assert [bytes(s3.read(f"k{i}")) for i in range(40)] == [b"%d" % i for i in range(40)]
    assert double.requests.total() <= 1.6 * 80  # 1 / 0.7 = 1.43 expected


def test_beyond_the_budget_it_says_so(double):
    impatient = S3Storage("bucket", "", S3Config(retry_s=0.05, pause_s=0.01))
    double.fail("503")
    with pytest.raises(Unavailable, match=r"GET x failed for 0 s, last with 503 SlowDown"):
        impatient.read("x", 0, 1)


@pytest.mark.parametrize(
    ("action", "message"),
    [("denied", "access denied"), ("skewed", "clock"), ("expired", "credentials have expired")],
)
def test_refusals_name_the_cure_and_are_not_retried_for_minutes(double, s3, action, message):
    double.fail(action)
    with pytest.raises(StorageError, match=message):
        s3.read("x", 0, 1)
    assert double.requests["GET"] == (2 if action == "expired" else 1)  # expired credentials are loaded anew once


def test_expired_credentials_are_renewed_once_and_the_work_goes_on(double, s3):
    s3.write("x", b"1")
    double.fail("expired", method="GET", nth=1)
    assert bytes(s3.read("x", 0, 1)) == b"1"


def credentials_from(profile: str, folder: Path, monkeypatch) -> None:
    """From now on AWS clients find their credentials by this profile alone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (folder / "config").write_text(f"[profile mine]\nregion = us-east-1\n{profile}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "nothing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "mine")


def test_credentials_that_do_not_come_at_once_are_asked_for_again(double, tmp_path, monkeypatch):
    """As those of a role, when the service that gives them is busy."""
    given = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b"}
    program, called = tmp_path / "program", tmp_path / "called"
    program.write_text(
        f"#!/bin/sh\necho >> {called}\n[ $(wc -l < {called}) -gt 2 ] || exit 1\necho '{json.dumps(given)}'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    credentials_from(f"credential_process = {program}\n", tmp_path, monkeypatch)
    s3 = S3Storage("bucket", "some/prefix", QUICK)
    s3.write("x", b"1")
    assert bytes(s3.read("x")) == b"1"
    assert s3.counts["retries"] == 2 and len(called.read_text()) == 3


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (
            "sso_start_url = https://nowhere.invalid/start\nsso_region = us-east-1\nsso_account_id = 123456789012\n"
            "sso_role_name = reader\n",
            "SSO",
        ),
        ("aws_access_key_id = a\n", "PartialCredentials"),
    ],
)
def test_credentials_that_a_person_must_renew_are_a_line_that_background_threads_survive(
    double, tmp_path, monkeypatch, profile, said
):
    credentials_from(profile, tmp_path, monkeypatch)
    with pytest.raises(
        StorageError, match=rf"store=s3://bucket/p: GET x: .*{said}.*; log in again, or check AWS_PROFILE"
    ):
        S3Storage("bucket", "p", QUICK).read("x", 0, 1)
    assert not double.requests


def test_wrong_buckets_and_endpoints_are_named(double, s3, monkeypatch):
    with pytest.raises(StorageError, match="there is no bucket nobucket"):
        list(S3Storage("nobucket", "", QUICK).list())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="is the endpoint up and reachable"):
        S3Storage("bucket", "", S3Config(retry_s=0.05, pause_s=0.01)).read("x", 0, 1)


def test_wrong_keys_are_named(seaweed, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed)
    with pytest.raises(StorageError, match="credentials are wrong"):
        S3Storage("bucket", "", QUICK).read("x", 0, 1)


def test_a_server_that_ignores_conditions_is_refused(double, s3):
    double.honest = False
    with pytest.raises(StorageError, match="a second conditional create of one key was accepted"):
        storage.check_conditional_create(s3)


def test_uploads_that_were_begun_and_left_are_found_and_discarded(double, s3):
    double.uploads["left"] = ("bucket", "some/prefix/data/x", {1: b"part"})
    (leftover,) = s3.leftovers()
    assert leftover.key.startswith("data/x")
    s3.discard(leftover)
    assert not double.uploads


@pytest.mark.parametrize("uri", ["s3:/bucket/acts", "s3:bucket", "file:/tmp/x", "S3:/bucket", "gs:/bucket"])
def test_a_mistyped_uri_is_not_a_folder(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"store={uri} is a mistyped URI"):
        storage.open(uri)
    assert storage.open(f"./{uri}").uri.startswith(str(tmp_path))


def test_what_is_no_file_is_refused_rather_than_waited_for(tmp_path):
    place = storage.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for key in ("pipe", "folder"):
        with pytest.raises(storage.StorageError, match=f"{key} is not a file"):
            place.read(key)
    assert len(map_bytes(tmp_path / "pipe", 0, 1)) == 0
