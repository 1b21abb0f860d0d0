"""`sae-dist label` on planted latents: labels, scores and controls, after stops, by a server and by a local model."""

import json
import logging
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_dist
from sae_dist import checksums
from sae_dist.cli.main import main
from sae_dist.interpret.features import GROUP_LATENTS
from sae_dist.interpret.read_features import features
from sae_dist.label import work
from sae_dist.label.evidence import Source
from sae_dist.model import tiny
from sae_dist.steer.labels import labels as steer_labels
from tests.label import world
from tests.label.chat_server import KEY, ChatServer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return world.write(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A run's folder of the test's own with the same feature data."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/features").symlink_to(made / "features")
    return tmp_path / "run"


def label(run: Path, *words: str) -> sae_dist.interpret.read_labels.Labels:
    assert main(["label", str(run), *words]) == 0
    return sae_dist.labels(run)


def rows(found) -> dict[int, dict]:
    return {row["latent"]: row for row in found.table().to_pylist()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_planted_latents_are_named_and_chance_is_chance(run, capsys):
    found = label(run)
    of = rows(found)
    assert sorted(of) == [latent for latent in range(world.N_LATENTS) if latent != world.DEAD] == sorted(found)
    for latent in range(world.N_TOKENS):
        own = of[latent]
        assert found[latent] == f'fires on "t{latent}"' and own["by"] == "offline"
        assert own["detection"] == own["fuzzing"] == own["detection_high"] == 1.0
        assert own["detection_items"] > 15 and 0.7 < own["detection_low"] < 1
    assert steer_labels(run) == dict(found)
    assert found[world.CATEGORY] == 'fires on any token, in "verse" text'
    assert of[world.CATEGORY]["detection"] == 1.0
    assert of[world.CATEGORY]["fuzzing_why"] == "fires too often" and of[world.CATEGORY]["fuzzing"] is None
    by_chance = [of[latent]["detection"] for latent in world.BY_CHANCE]
    assert abs(sum(by_chance) / len(by_chance) - 0.5) < 0.1
    assert checksums.damage(run / "labels") == "" and not (run / "labels.partial").exists()
    said = capsys.readouterr().out
    assert "35 of 35 latents have a label, by offline" in said and "better than chance, and better than" in said
    page = (run / "labels/index.html").read_text()
    assert "better than labels of other latents" in page and "No fuzzing score: 1 (fires too often)" in page


def test_the_control_is_the_label_of_another_latent(run):
    found = label(run, f"label.latents={list(range(world.N_TOKENS))}")
    assert all(row["detection_shuffled"] <= 0.6 for row in rows(found).values())
    scores = found.scores["detection"]
    assert scores["label"]["value"] == 1.0 and abs(scores["shuffled"]["value"] - 0.5) < 0.05
    assert scores["beats"] == {"chance": True, "shuffled": True} and scores["chance"] == 0.5


def test_labels_that_do_not_beat_the_controls_say_so_in_words(run, capsys):
    found = label(run, f"label.latents={list(world.BY_CHANCE)}")
    assert not all(found.scores["detection"]["beats"].values())
    words = "These labels do not say where a latent fires better than"
    assert words in capsys.readouterr().out and words in (run / "labels/index.html").read_text()
    one = label(run, "label.latents=[3]")
    assert rows(one)[3]["detection_shuffled"] is None and one.scores["detection"]["beats"]["shuffled"] is None
    assert "cannot be told from 0 scored latents; 10 are needed" in one.scores["detection"]["said"]


def test_some_latents_and_some_scores(run):
    found = label(run, "label.latents=20", "label.scored=6")
    assert len(found) == 20 and found.scores["detection"]["label"]["latents"] == 6
    again = label(run, "label.latents=20", "label.scored=6", "label.seed=1")
    assert set(found) != set(again)


def test_what_is_shown_and_what_is_held_out_have_both_kinds_of_contexts_and_no_document_in_common(made):
    for evidence in Source(features(made), shown=100, held=100, seed=0).read(range(world.N_TOKENS)):
        sides = [evidence.shown, evidence.held]
        assert all({-1} < {p.interval for p in side} for side in sides)
        assert {p.interval for p in sides[0]} == {p.interval for p in sides[1]}
        assert not {p.doc for p in sides[0]} & {p.doc for p in sides[1]}
        assert abs(len(sides[0]) - len(sides[1])) <= 6
        for own, others in ((evidence.shown, evidence.others), (evidence.held, evidence.held_others)):
            assert sorted(p.category for p in own) == sorted(p.category for p in others)
            assert not any(p.peak == f" T{evidence.latent}" for p in others)


def stops_after(calls: int, function):
    left = iter(range(calls))

    def counted(*values):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*values)

    return counted


def test_work_that_was_stopped_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "TOGETHER", 8)
    label(run)
    other = tmp_path / "run2"
    other.mkdir()
    (other / "features").symlink_to(run / "features")
    with monkeypatch.context() as patched:
        patched.setattr(work, "_write", stops_after(2, work._write))
        assert main(["label", str(other)]) == 75
    assert "run the same command again to resume" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in (other / "labels.partial").glob("part-*")}
    assert len(kept) == 2 and not (other / "labels").exists()
    with monkeypatch.context() as patched:
        patched.setattr(work, "_write", stops_after(3, work._write))
        assert main(["label", str(other)]) == 75
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    label(other)
    theirs, own = (contents(each / "labels") for each in (run, other))
    for found in (theirs, own):  # the page names its run
        del found["index.html"], found["checksums.json"]
    assert theirs == own


@pytest.fixture
def server():
    found = ChatServer()
    yield found
    found.close()


def by_server(server: ChatServer, *words: str) -> list[str]:
    return ["label.by=server", f"label.url={server.url}", "label.model=any", "label.backoff=0.01", *words]


TEN = f"label.latents={list(range(world.N_TOKENS))}"


def test_a_server_is_asked_each_question_once_whatever_stops_the_work(run, server, capsys, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    words = by_server(server, TEN, "label.key_env=MY_KEY", "label.per_question=7")
    server.failures = [(429, {"Retry-After": "0"}), (503, {})]  # before any answer: worth waiting for all the same
    server.answers_left = 23
    assert main(["label", str(run), *words]) == 2
    said = capsys.readouterr().err
    assert "refuses the request (400: enough of Bearer ...); label.body changes what is sent" in said
    assert len((run / "labels.answers.jsonl").read_text().splitlines()) == 23
    with (run / "labels.answers.jsonl").open("a") as file:
        file.write('{"question": "half of a li')
    server.answers_left = None
    with caplog.at_level(logging.DEBUG):
        found = label(run, *words)
    assert len(server.asked) == len(set(server.asked)) > 50 and server.keys == {f"Bearer {KEY}"}
    assert found[3] == "T3 Bearer ..." and rows(found)[3]["by"] == "any"
    assert all(row["detection"] == row["fuzzing"] == 1.0 for row in rows(found).values())
    first = contents(run / "labels")
    assert label(run, *words) and label(run, *words, "label.scored=9") and label(run, *words)
    assert len(server.asked) == len(set(server.asked)) and contents(run / "labels") == first
    written = b"".join(contents(run).values()).decode(errors="replace") + caplog.text + said
    assert KEY not in written + "".join(capsys.readouterr())


def test_text_of_the_corpus_cannot_break_out_of_a_prompt(run, server):
    label(run, *by_server(server, "label.latents=[3]"))
    asked = server.asked[0].split("first texts:\n")[1].splitlines()
    texts = [line for line in asked if line.startswith('"')]
    assert len(texts) > 10 and all("⟦" in json.loads(line) for line in texts)


@pytest.mark.parametrize(
    ("failures", "words", "said"),
    [
        ([(401, {})], (), "asks for a key (401: no, None); name the environment variable"),
        ([(403, {})], ("label.key_env=MY_KEY",), "refuses the key (403: no, Bearer ...); put another one into"),
        ([(404, {})], (), "does not know label.model=any, or has no chat/completions (404: no, None); check both"),
        ([(307, {"Location": "http://127.0.0.1:9/v1"})], (), "sends requests elsewhere (307), where no key should go"),
        ([(500, {})] * 9, ("label.retries=1",), "has no answer (500: no, None); repeat the command later"),
    ],
)  # fmt: skip
def test_what_a_server_refuses_is_one_line(run, server, capsys, monkeypatch, failures, words, said):
    monkeypatch.setenv("MY_KEY", KEY)
    server.failures = failures
    assert main(["label", str(run), *by_server(server, "label.latents=[3]", "label.requests=1", *words)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and KEY not in errors[0] and server.asked == []


@pytest.mark.parametrize("key", [f"{KEY}\nanother", f"“{KEY}”", f"{KEY}\udce9", f"{KEY}\tx"])
def test_what_no_header_can_hold_is_no_key_and_is_not_shown(run, server, capsys, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    assert main(["label", str(run), *by_server(server, "label.latents=[3]", "label.key_env=MY_KEY")]) == 2
    said = capsys.readouterr().err
    assert "label.key_env=MY_KEY: what that environment variable holds has line breaks or" in said
    assert KEY not in said and server.asked == [] and server.keys == set()


def test_a_server_that_is_not_there_or_no_chat_server_is_one_line(run, server, capsys):
    server.content = "thoughts\n"
    one = ["label.latents=[3]", "label.scored=0"]
    assert main(["label", str(run), *by_server(server, *one)]) == 0
    words = by_server(server, *one, "label.seed=3")
    server.close()
    assert main(["label", str(run), *words]) == 2
    assert "cannot be reached (Connection refused); check the address, and that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["label.latents=[3,99]"], "label.latents: 99 is not there; the dictionary has 0 to 35"),
        (["label.latents=[11]"], "label.latents: 11 never fires in the feature data"),
        (["label.latents=[]"], "latents=[] names none"),
        (["label.by=server"], "url is missing; by=server needs url=http://HOST:PORT/v1 and model=NAME"),
        (["label.url=http://x/v1"], "url=http://x/v1 is for a server; give by=server with it"),
        (["label.key_env=MY_KEY"], "key_env=MY_KEY is for a server; give by=server with it"),
        (["label.by=model", "label.body={top_p: 1}"], "body={'top_p': 1} is for a server; give by=server with it"),
        (["label.model=gpt2"], "by=offline asks no model"),
        (["label.by=server", "label.model=m", "label.url=http://me:secret@x/v1"], "url has a user, a password or a"),
        (["label.by=server", "label.model=m", "label.url=x/v1"], "url=x/v1 is no address"),
        (["label.by=server", "label.model=m", "label.url=http://x", "label.key_env=NO_SUCH"], "label.key_env=NO_SUCH"),
        (["label.by=model", "label.model=/nowhere"], "model.name=/nowhere: no such folder"),
        (["label.by=model", "label.model=tiny-llama"], "has 512 positions, and a prompt of"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, capsys, words, said):
    assert main(["label", str(run), *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "secret" not in errors[0]
    assert not (run / "labels").exists()


def test_a_dictionary_of_which_no_latent_fires_is_one_line(made, tmp_path, capsys):
    run = tmp_path / "silent"
    shutil.copytree(made / "features", run / "features")
    (path,) = (run / "features").glob("latents-*.parquet")
    table = pq.read_table(path)
    place, zeros = table.schema.get_field_index("firings"), pa.array([0] * len(table), pa.int64())
    silent = table.set_column(place, "firings", zeros)
    pq.write_table(silent, path, row_group_size=GROUP_LATENTS, write_page_checksum=True)
    for words in ([], ["label.latents=5"], ["label.latents=[3]"]):
        assert main(["label", str(run), *words]) == 2
        assert f"error: no latent fires in the feature data {run}/features" in capsys.readouterr().err


def test_a_run_without_feature_data_is_one_line(tmp_path, capsys):
    assert main(["label", str(tmp_path)]) == 2
    assert re.search(r"has no feature data, .* `sae-dist pages .* data=true`", capsys.readouterr().err)
    with pytest.raises(sae_dist.config.UserError, match="scores.json is missing; write it again with `sae-dist label"):
        sae_dist.labels(tmp_path)


@pytest.mark.slow
def test_a_local_model_gives_the_same_bytes_again_and_what_cannot_be_read_is_said(run, tmp_path):
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny.model_folder("tiny-llama"))
    model.config.max_position_embeddings = 1 << 14
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.model_folder("tiny-llama")).save_pretrained(folder)
    words = ["label.by=model", f"label.model={folder}", "label.latents=[3,4]", "label.max_tokens=4", "label.contexts=2",
             "label.held_out=2"]  # fmt: skip
    found = label(run, *words)
    first = contents(run / "labels")
    assert len(found) == 2 and found.scores["detection"]["not_scored"] == {"answer not understood": 2}
    (run / "labels/scores.json").unlink()
    (run / "labels.answers.jsonl").unlink()
    label(run, *words)
    assert contents(run / "labels") == first
