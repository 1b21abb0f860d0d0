"""Latents sent by Neuronpedia's own client to a server that keeps what arrives."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from neuronpedia.requests.base_request import NPRequest

import sae_dist
from sae_dist.cli.main import main
from tests.dashboards.test_dashboards import run  # noqa: F401  a fixture
from tests.interpret.test_features import N_LATENTS

KEY = "a-secret-key"


class Server(ThreadingHTTPServer):
    """Takes batches with the right key; answers `status` from request number `fails_at` on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.taken, self.asked, self.fails_at, self.status = list[dict](), 0, 10**9, 500


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.asked += 1
        failed = server.asked > server.fails_at
        status = server.status if failed else 200 if self.headers["X-Api-Key"] == KEY else 401
        if status == 200:
            assert self.path == "/api/feature/upload-batch"
            server.taken.append(body)
        said = b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
        """The test says what was asked."""


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    with Server() as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        monkeypatch.setattr(NPRequest, "BASE_URL", f"http://127.0.0.1:{own.server_address[1]}/api")
        monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
        yield own
        own.shutdown()


@pytest.fixture
def own(run, tmp_path) -> Path:  # noqa: F811
    """The run in a folder of the test's own."""
    (tmp_path / "run").mkdir()
    for path in run.iterdir():
        (tmp_path / "run" / path.name).symlink_to(path)
    return tmp_path / "run"


def send(own: Path, *words: str) -> int:
    return main(["export", str(own), "format=neuronpedia", "to=neuronpedia://tiny/mine-res", *words])


def test_all_latents_arrive_once_with_contexts_and_labels(own, server, capsys):
    assert send(own) == 0
    alive = {row["latent"]: row for row in sae_dist.features(own).read(range(N_LATENTS)).to_pylist() if row["firings"]}
    assert all((batch["modelId"], batch["source"]) == ("tiny", "3-mine-res") for batch in server.taken)
    assert all(0 < len(batch["features"]) <= 128 for batch in server.taken)
    sent = [feature for batch in server.taken for feature in batch["features"]]
    assert [feature["index"] for feature in sent] == sorted(alive)
    labels = sae_dist.labels(own)
    for feature in sent:
        row = alive[feature["index"]]
        assert feature["density"] == row["density"] and len(feature["activations"]) == len(row["contexts"])
        said = [each["text"] for each in feature["explanations"]]
        assert said == [labels[feature["index"]]] if feature["index"] in labels else said == []
        assert len(feature["topLogits"]) == len(row["promoted"])
    shown = capsys.readouterr()
    assert f"{len(alive):,} latents sent to neuronpedia://tiny/mine-res" in shown.out
    assert "Sending POST" not in shown.out and KEY not in shown.out + shown.err
    assert send(own) == 0 and len(server.taken) == server.asked == 5  # nothing is sent twice
    assert "0 latents sent" in capsys.readouterr().out
    assert all(KEY not in path.read_text() for path in own.glob("*.json"))


@pytest.mark.parametrize(("status", "message"), [(500, "and repeat the command: it goes on"), (429, "takes no more")])
def test_after_a_failure_it_goes_on(own, server, capsys, status, message):
    server.fails_at, server.status = 2, status
    assert send(own) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1] and len(server.taken) == 2
    server.fails_at = 10**9
    assert send(own) == 0 and len(server.taken) == 5
    sent = [feature["index"] for batch in server.taken for feature in batch["features"]]
    assert len(sent) == len(set(sent))


@pytest.mark.parametrize(
    ("key", "words", "message"),
    [
        (None, [], "NEURONPEDIA_API_KEY is not set"), ("wrong", [], "does not take this key"),
        (KEY, ["to=neuronpedia://tiny"], "give neuronpedia://MODEL/SET"),
        (KEY, ["set_name=other"], "set_name=other is said by to=neuronpedia://tiny/mine-res already"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(own, server, capsys, monkeypatch, key, words, message):
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    if key is not None:
        monkeypatch.setenv("NEURONPEDIA_API_KEY", key)
    line = [word for word in ["to=neuronpedia://tiny/mine-res"] if not any(w.startswith("to=") for w in words)]
    assert main(["export", str(own), "format=neuronpedia", *line, *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and message in said[0] and not server.taken


def test_other_latents_are_not_sent_over_those_that_are_there(own, server, capsys):
    assert send(own) == 0
    record = own / "neuronpedia-tiny-3-mine-res.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"of": "another"}))
    assert send(own) == 2
    assert "is of other latents that were sent to 3-mine-res" in capsys.readouterr().err
