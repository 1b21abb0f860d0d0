"""sae-dist serve: what the page lists, which files can be read and in which parts, and that nothing else can be."""

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.cli.serve_view import Snapshots
from sae_dist.interpret import site
from sae_dist.service.run_folder import claim
from sae_dist.service.shown_features import ShownFeatures
from sae_dist.service.shown_folder import shown_folder
from sae_dist.service.web_server import WebServer, byte_range
from sae_dist.sweep.folder import SweepFolder
from tests.interpret import hostile
from tests.shards.seaweedfs import KEYS

DEADLINE_S = 600  # of a process that loads torch on a machine that has much else to do
NAME = 'run <b>"1" & 2'  # of a run: what a page must escape
CONTENT = bytes(range(256)) * 16


class Answer(NamedTuple):
    status: int
    about: http.client.HTTPMessage
    body: bytes


class Served(NamedTuple):
    root: Path
    port: int

    def get(self, path: str, method: str = "GET", **about: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        connection.request(method, path, headers={key.replace("_", "-"): value for key, value in about.items()})
        answer = connection.getresponse()
        found = Answer(answer.status, answer.headers, answer.read())
        connection.close()
        return found


def fill(root: Path, finished: Path) -> None:
    """Two runs, one of them at work on two dictionaries; a sweep; a damaged one; secrets, and links to them."""
    done, live = root / "runs" / NAME, root / "runs" / "live"
    for run in (done, live):
        shutil.copytree(finished, run)
    (live / "summary.json").unlink()
    said = json.loads((live / "status.json").read_text()) | {"state": "running", "train": {"step": 10, "of": 10}}
    (live / "status.json").write_text(json.dumps(said))
    line = {"step": 10, "time": time.time(), "fvu": 0.5, "l0": 4.0, "k<8>/fvu": 0.25, "k<8>/l0": 8.0}
    with (live / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    sweep = SweepFolder(root / "sweeps" / "mine")
    sweep.path.mkdir(parents=True)
    sweep.open("train", ["sae.k"], ["train", "sae.k=4,8"])
    (root / "sweeps" / "broken").mkdir()
    (root / "sweeps" / "broken" / "sweep.json").write_text("{")
    hostile.write_data(done)
    assert main(["label", str(done)]) == 0
    for folder in (done / "pages" / "data", sweep.report / "plots"):
        folder.mkdir(parents=True)
        (folder.parent / "index.html").write_text("<p>here</p>")
    (done / "pages" / "data" / "tokens.js").write_bytes(CONTENT)
    (sweep.report / "plots" / "law.svg").write_text("<svg/>")
    hostile.write(root / "static")
    (live / "features").symlink_to(done / "features")
    (root / "secret.txt").write_text("secret")
    (done / "pages" / "link.txt").symlink_to(root / "secret.txt")
    (done / "pages" / "inside.js").symlink_to(done / "pages" / "data" / "tokens.js")
    (done / "pages" / "run").symlink_to(done)
    (done / "pages" / ".hidden").write_text("secret")
    os.mkfifo(done / "pages" / "pipe")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "pages").mkdir()
    (root / "elsewhere" / "pages" / "index.html").write_text("of no run")
    (root / "linked").symlink_to(done)


@pytest.fixture(scope="module")
def served(finished, tmp_path_factory) -> Iterator[Served]:
    """The command in a process of its own, which Ctrl-C ends."""
    root = tmp_path_factory.mktemp("team")
    fill(root, finished[0])
    command = [sys.executable, "-m", "sae_dist", "serve", str(root), "port=0"]
    with claim(root / "runs" / "live"), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            where, _, url = process.stdout.readline().strip().rpartition(": ")
            assert where == str(root) and url.startswith("http://127.0.0.1:")
            yield Served(root, int(url.rstrip("/").rpartition(":")[2]))
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


RUN = "/runs/run%20%3Cb%3E%221%22%20%26%202"


def test_the_page_lists_runs_members_and_sweeps(served):
    page = served.get("/").body.decode()
    assert f'<a href="{RUN[1:]}/pages/">runs/run &lt;b&gt;&quot;1&quot; &amp; 2</a>' in page
    assert '<a href="sweeps/mine/report/">sweeps/mine</a>' in page
    assert f'<a href="{RUN[1:]}/labels/">labels</a>' in page
    for part in ("2 runs", "1 at work", "2 sweeps", "10 of 10 steps", ">done<", ">training<", "k&lt;8&gt;", "0.250"):
        assert part in page, part
    assert "sweeps/broken/sweep.json is damaged" in page
    assert NAME not in page and "elsewhere" not in page and "linked" not in page
    assert served.get("/").about["Content-Type"] == "text/html; charset=utf-8"


def test_the_page_follows_what_the_run_says(served):
    with (served.root / "runs" / "live" / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 10, "time": time.time(), "fvu": 0.125, "l0": 4.0}) + "\n")
    deadline = time.monotonic() + DEADLINE_S
    while b"0.125" not in served.get("/").body:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    script = served.get("/serve.js")
    assert b'fetch("./"' in script.body and b"innerHTML" not in script.body
    assert script.about["Content-Type"] == "text/javascript; charset=utf-8"


def value(served, what: str) -> Any:
    """What the pages of the run's feature data are told."""
    answer = served.get(f"{RUN}/features/data/{what}")
    assert answer.status == 200 and answer.about["Content-Type"] == "application/json", answer.body
    assert answer.body.isascii() and b"<" not in answer.body
    return json.loads(answer.body)


def told(answer: dict[str, Any], tokens: list[Any]) -> dict[str, Any]:
    """A record with its tokens instead of their numbers."""
    ids = np.frombuffer(base64.b64decode(answer["text"]), "<u2")
    named = {key: [[tokens[i] for i in answer[key][0]], answer[key][1]] for key in ("promoted", "suppressed")}
    return answer | named | {"text": [tokens[i] for i in ids], "similar": None}


def test_a_latent_of_feature_data_is_that_of_the_static_pages(served):
    pages = served.root / "static" / "pages"
    index, tokens, facts = (site.read(pages, name) for name in ("index", "tokens", "summary"))
    assert b'<a href="runs/run%20%3Cb%3E%221%22%20%26%202/features/">feature data</a>' in served.get("/").body
    ours = value(served, "facts")
    assert ours["summary"]["name"] == hostile.SUMMARY["name"] and ours["categories"] == facts["categories"]
    shown = {**dict.fromkeys(map(json.dumps, tokens)), json.dumps("?"): None}  # no character: half of a pair
    for latent in range(0, hostile.N_LATENTS, 7):
        found = value(served, f"latents/{latent}")
        record = site.read(pages, f"latents-{latent // site.LATENTS_PER_FILE}")[latent % site.LATENTS_PER_FILE]
        lone = [("?" if token == "\udc80" else token) for token in tokens]
        assert told(found["record"], found["tokens"]) == told(record, lone)
        row = found["row"]
        assert (row["count"], row["maximum"], row["mean"]) == tuple(
            index[key][latent] for key in ("count", "maximum", "mean")
        )
        assert {json.dumps(token) for token in row["tokens"]} <= set(shown) and row == value(served, f"row/{latent}")


def test_the_list_of_feature_data_is_searched_sorted_and_read_in_parts(served):
    index = site.read(served.root / "static" / "pages", "index")
    fired = [latent for latent in range(hostile.N_LATENTS) if index["count"][latent]]
    overview = value(served, "overview")
    assert overview["fired"] == len(fired) == sum(overview["bars"]) == len(overview["dots"]["latent"])
    found = value(served, "selection?sort=max")
    strongest = sorted(fired, key=lambda latent: -index["maximum"][latent])
    assert found["total"] == found["listed"] == len(fired) and found["rows"][0]["latent"] == strongest[0]
    assert [row["latent"] for row in value(served, "rows?sort=max&from=3&to=6")] == [
        row["latent"] for row in found["rows"][3:6]
    ]
    at = [row["latent"] for row in found["rows"]].index(strongest[-1])
    walk = value(served, f"walk/{strongest[0]}?sort=max")
    assert walk == {"place": 0, "total": len(fired), "previous": None, "next": found["rows"][1]["latent"]} and at > 0
    script = value(served, "selection?q=%22%3Cscript%3Ealert(1)%3C%2Fscript%3E%22")
    assert 0 < script["total"] < len(fired)
    assert all("<script>alert(1)</script>" in row["tokens"] for row in script["rows"])
    silent = value(served, "selection?all=1&d=0..0")
    assert silent["total"] == hostile.N_LATENTS - len(fired) and sum(silent["bars"]) == 0
    one = value(served, f"selection?q=%23{fired[3]}&m=0..1e9&dir=desc")
    assert fired[3] in [row["latent"] for row in one["rows"]]


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [("latents/70", 404, "There is no latent 70: the dictionary has 0 to 69."), ("latents/007", 404, "no such page"),
     ("row/70", 404, "no latent 70"), ("latents/-1", 404, "no such page"), ("latents/1/2", 404, "no such page"),
     ("selection?sort=%3Cb%3E", 400, "sort=<b> is not known; choose of latent, max"),
     ("selection?dir=up", 400, "dir=up is not known"), ("selection?d=1..x", 400, "d=1..x is no range; give"),
     ("rows?from=0&to=501", 400, "from=0 to=501 are no rows of the list; ask for at most 500"),
     ("rows?from=x&to=1", 400, "from=x is no number of a row"), ("../features.json", 404, "no such page"),
     ("index.parquet", 404, "no such page")],
)  # fmt: skip
def test_what_feature_data_cannot_answer_is_one_line_of_text(served, what, status, said):
    answer = served.get(f"{RUN}/features/data/{what}")
    assert answer.status == status and said in answer.body.decode() and answer.body.count(b"\n") == 1
    assert answer.about["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "kind"),
    [(f"{RUN}/pages/", "text/html; charset=utf-8"), (f"{RUN}/pages/data/tokens.js", "text/javascript; charset=utf-8"),
     ("/sweeps/mine/report/", "text/html; charset=utf-8"), ("/sweeps/mine/report/plots/law.svg", "image/svg+xml"),
     ("/site.css", "text/css; charset=utf-8"), (f"{RUN}/features/", "text/html; charset=utf-8"),
     (f"{RUN}/features/latent.html", "text/html; charset=utf-8"),
     (f"{RUN}/features/source.js", "text/javascript; charset=utf-8"),
     (f"{RUN}/labels/", "text/html; charset=utf-8")],
)  # fmt: skip
def test_files_have_their_types_and_may_be_read_by_no_other_site(served, path, kind):
    answer = served.get(path)
    assert (answer.status, answer.about["Content-Type"]) == (200, kind)
    assert int(answer.about["Content-Length"]) == len(answer.body) > 0
    assert answer.about["X-Content-Type-Options"] == "nosniff"
    assert answer.about["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "script-src 'self';" in answer.about["Content-Security-Policy"]
    head = served.get(path, "HEAD")
    assert head.body == b"" and head.about["Content-Length"] == answer.about["Content-Length"]


def test_a_folder_without_its_slash_leads_to_its_page(served):
    answer = served.get("/sweeps/mine/report")
    assert (answer.status, answer.about["Location"]) == (301, "report/")


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [("bytes=0-9", 206, CONTENT[:10]), ("bytes=4090-", 206, CONTENT[4090:]), ("bytes=-5", 206, CONTENT[-5:]),
     ("bytes=4000-999999", 206, CONTENT[4000:]), ("bytes=9-0", 200, CONTENT), ("bytes=0-1,5-6", 200, CONTENT),
     ("lines=0-9", 200, CONTENT), ("bytes=4096-", 416, b""), ("bytes=-0", 416, b"")],
)  # fmt: skip
def test_a_part_of_a_file(served, asked, status, content):
    answer = served.get(f"{RUN}/pages/data/tokens.js", Range=asked)
    assert answer.status == status
    if status == 416:
        assert answer.about["Content-Range"] == "bytes */4096"
        return
    assert answer.body == content and answer.about["Accept-Ranges"] == "bytes"
    if status == 206:
        start = CONTENT.index(content) if len(content) > 256 else 4096 - len(content) if content != CONTENT[:10] else 0
        assert answer.about["Content-Range"] == f"bytes {start}-{start + len(content) - 1}/4096"


def test_a_part_is_of_the_file_that_the_reader_knows(served):
    path = f"{RUN}/pages/data/tokens.js"
    tag = served.get(path).about["ETag"]
    assert served.get(path, Range="bytes=0-9", If_Range=tag).status == 206
    assert served.get(path, Range="bytes=0-9", If_Range='"another"').status == 200
    assert served.get(path, Range="bytes=0-9", If_Range="Sun, 29 Nov 2026 00:00:00 GMT").status == 200
    assert served.get(path, If_None_Match=f'"x", {tag}')[0::2] == (304, b"")
    other = served.root / "runs" / NAME / "pages" / "data" / "other.js"
    other.write_bytes(CONTENT[:100])
    before = served.get(f"{RUN}/pages/data/other.js").about["ETag"]
    other.write_bytes(CONTENT[100:200])
    os.utime(other, ns=(1, 1))
    assert served.get(f"{RUN}/pages/data/other.js", If_None_Match=before).status == 200


@pytest.mark.parametrize(
    "path",
    ["/secret.txt", f"{RUN}/config.yaml", f"{RUN}/status.json", f"{RUN}/dictionary/config.json", f"{RUN}/",
     f"{RUN}/checkpoints/step_10/manifest.json", f"{RUN}/pages/../config.yaml", f"{RUN}/pages/%2e%2e/config.yaml",
     f"{RUN}/pages/..%2fconfig.yaml", f"{RUN}/pages/data/../../../../secret.txt", f"{RUN}/pages//data/tokens.js",
     f"{RUN}/pages/link.txt", f"{RUN}/pages/inside.js", f"{RUN}/pages/run/config.yaml", f"{RUN}/pages/.hidden",
     f"{RUN}/pages/pipe", f"{RUN}/pages/data/", f"{RUN}/pages/%00", f"{RUN}/pages/{'a' * 4000}",
     f"/{'a' * 300}/pages/x", f"/{'a' * 300}/features/data/facts",
     f"{RUN}/report/index.html", f"{RUN}/features/features.json", f"{RUN}/features/index.parquet",
     f"{RUN}/features/latents-000000000.parquet", "/runs/live/features/", "/runs/live/features/data/facts",
     "/elsewhere/pages/index.html", "/linked/pages/index.html", "/sweeps/mine/pages/", "/sweeps/mine/sweep.json",
     "//secret.txt", "/pages/", "/..", "/%ff/pages/x", "/sweeps/mine/report/index.html/x"],
)  # fmt: skip
def test_nothing_else_can_be_read(served, path):
    answer = served.get(path)
    assert answer.status == 404
    assert b"secret" not in answer.body and b"n_latents" not in answer.body


def test_another_sites_name_does_not_lead_to_the_loopback(served):
    assert served.get("/", Host="attacker.example").status == 421
    assert served.get("/", Host="127.0.0.1.attacker.example:80").status == 421
    for name in ("localhost:8000", "127.0.0.1", "[::1]:99"):
        assert served.get("/", Host=name).status == 200


def test_what_is_asked_to_be_changed_is_refused(served):
    assert served.get("/", "POST").status == 501
    assert served.get(f"{RUN}/pages/index.html", "DELETE").status == 501


@pytest.mark.parametrize(("asked", "found"), [("bytes=-5", range(0)), ("bytes=0-", range(0)), ("bytes=-", None)])
def test_no_part_of_an_empty_file(asked, found):
    assert byte_range(asked, 0) == found


def test_a_run_alone_is_served_from_its_own_folder(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "pages").mkdir()
    (run / "pages" / "index.html").write_text("here")
    folder = shown_folder(str(run), retry_s=0)
    assert folder.found() == ([""], [])
    with folder.open(["pages", "index.html"]) as file:
        assert file is not None and file.read(0, 10) == b"here"
    with folder.open(["config.yaml"]) as file:
        assert file is None
    server = WebServer("127.0.0.1", 0, folder=folder, page=lambda: "", beside={}, made=lambda *_: None)
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        own = Served(run, server.server_port)
        found = own.get("/pages"), own.get("/pages/"), own.get("/report/")
        server.shutdown()
        thread.join()
    assert (found[0].status, found[0].about["Location"]) == (301, "pages/")
    assert (found[1].status, found[1].body, found[2].status) == (200, b"here", 404)


def test_other_addresses_are_warned_of_and_ctrl_c_is_the_end(tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = []

    def look() -> None:
        try:
            for _ in range(600):
                try:
                    page.append(Served(tmp_path, port).get("/", Host="a.name").body)
                    return
                except ConnectionError:
                    time.sleep(0.1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    looker = threading.Thread(target=look)
    looker.start()
    assert main(["serve", str(tmp_path), "host=0.0.0.0", f"port={port}"]) == 0
    looker.join()
    assert b"There is no run and no sweep here yet" in page[0]
    assert "warning: host=0.0.0.0 lets everybody who reaches http://0.0.0.0:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["{tmp}/nothing"], "out={tmp}/nothing is no folder"), (["{tmp}", "port=70000"], "port=70000: give 65535 or less"),
     (["{tmp}", "port={taken}"], "port={taken} at host=127.0.0.1 cannot be had (Address already in use); choose"),
     (["{tmp}", "host=192.0.2.7"], "at host=192.0.2.7 cannot be had"), 
     (["{tmp}", "host=no such host"], "at host=no such")],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(tmp_path, capsys, words, said):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        named = {"tmp": tmp_path, "taken": other.getsockname()[1]}
        assert main(["serve", *(word.format(**named) for word in words)]) == 2
    assert said.format(**named) in capsys.readouterr().err


def test_a_list_that_was_read_ahead_needs_its_index_no_more(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    hostile.write_data(run)
    folder = shown_folder(str(tmp_path), retry_s=1)
    features = ShownFeatures(folder)
    Snapshots(folder, features, retry_s=1).read_ahead()
    (run / "features" / "index.parquet").unlink()
    asked = ["run", "features", "data", "selection"], "sort=max&dir=desc"
    assert features(*asked).status == 200
    assert b"index.parquet is damaged or missing" in ShownFeatures(folder)(*asked).body


def test_data_that_cannot_be_read_ahead_are_named_and_the_server_goes_on(finished, tmp_path, caplog):
    shutil.copytree(finished[0], tmp_path / "run")
    hostile.write_data(tmp_path / "run")
    (tmp_path / "run" / "features" / "index.parquet").write_bytes(b"PAR1")
    folder = shown_folder(str(tmp_path), retry_s=1)
    Snapshots(folder, ShownFeatures(folder), retry_s=1).read_ahead()
    assert "will be read when somebody asks" in caplog.text and "index.parquet is damaged" in caplog.text


def test_a_copy_on_object_storage(seaweed, monkeypatch):
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": seaweed}.items():
        monkeypatch.setenv(name, value)
    place = storage.open("s3://bucket/team")
    for key in ("a/status.json", "a/config.yaml", "a/pages/index.html", "a/pages/x/metrics.jsonl", "b/sweep.json"):
        place.write(key, key.encode())
    folder = shown_folder("s3://bucket/team", retry_s=5)
    assert folder.found() == (["a"], ["b"])
    with folder.open(["a", "pages", "index.html"]) as file:
        assert file is not None and (file.size, bytes(file.read(2, 5))) == (18, b"pages")
    for path in (
        "a/config.yaml",
        "a/pages/index.htm",
        "a/pages/../config.yaml",
        "b/pages/index.html",
        "a/pages/é.html",
    ):
        with folder.open(path.split("/")) as file:
            assert file is None, path
