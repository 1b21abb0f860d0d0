"""The site holds what was collected, opens from disk, and no text of the corpus can act in it."""

import base64
import functools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from sae_dist import checksums
from sae_dist.interpret.site import SERVED, STATIC
from sae_dist.interpret.vocabulary import decoder
from tests.interpret.hostile import CONTEXT, HOSTILE, N_LATENTS, PIECES, SUMMARY, Stream, write


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run")).parent


def test_every_file_that_is_damaged_or_missing_is_found(tmp_path):
    pages = write(tmp_path).parent
    files = [path for path in pages.rglob("*") if path.is_file()]
    (pages / "notes.txt").write_text("a file that is not the site's is no damage")
    assert checksums.damage(pages) == ""
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert file.name in checksums.damage(pages)
        file.unlink()
        assert file.name in checksums.damage(pages)
        file.write_bytes(content)
    assert checksums.damage(pages) == ""


def received(pages: Path, name: str):
    """What a data file hands over; fails unless the file is one call with one JSON value and nothing else."""
    text = (pages / "data" / f"{name}.js").read_text()
    call = re.fullmatch(r'saePages\.receive\("([\w-]+)",(.*)\);\n', text)
    assert call is not None and call[1] == name
    return json.loads(call[2])


def test_pages_without_logit_effects_say_why(pages: Path, tmp_path: Path):
    without = write(tmp_path, no_outputs="the hook point is <elsewhere>").parent
    assert received(without, "summary")["no_outputs"] == "the hook point is <elsewhere>"
    assert received(pages, "summary")["no_outputs"] is None
    assert received(without, "index")["promoted"] == [[]] * N_LATENTS
    for ours, theirs in zip(received(without, "latents-0"), received(pages, "latents-0"), strict=True):
        assert ours["promoted"] == ours["suppressed"] == [[], []]
        assert ours["histogram"] == theirs["histogram"] and len(ours["contexts"]) == len(theirs["contexts"])


def test_no_text_can_leave_its_string(pages: Path):
    for path in (pages / "data").iterdir():
        text = path.read_text()
        assert text.isascii() and "<" not in text
        received(pages, path.stem)
    assert set(HOSTILE) <= {t for t in received(pages, "tokens") if isinstance(t, str)}
    assert received(pages, "summary")["summary"]["name"] == SUMMARY["name"]
    assert "<script>" in received(pages, "summary")["categories"]


def test_pages_write_text_only_as_text():
    for path in [*STATIC.glob("*.js"), *SERVED.glob("*.js")]:
        script = path.read_text()
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
            assert way not in script, f"{path.name} uses {way}"


def test_pages_run_no_inline_script_and_reach_no_network():
    for path in STATIC.glob("*.html"):
        page = path.read_text()
        assert "default-src 'none'; script-src 'self' file:;" in page
        assert not re.search(r"<script(?![^>]*\ssrc=)", page) and not re.search(r"\son\w+=", page)
    for path in STATIC.iterdir():
        assert set(re.findall(r"https?://[^\"' )]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}
        assert "@import" not in path.read_text() and "url(" not in path.read_text()


def test_pages_load_only_files_that_lie_beside_them(pages: Path):
    for page in ("index.html", "latent.html"):
        for name in re.findall(r'(?:src|href)="([^"#]+)"', (pages / page).read_text()):
            assert (pages / name).is_file()


def test_contexts_hold_the_tokens_of_the_corpus(pages: Path):
    tokens, facts = received(pages, "tokens"), received(pages, "summary")
    names = [p.hex() if isinstance(p, bytes) else p for p in PIECES]
    corpus = [[names[t] for t in document] for document in Stream.tokens.tolist()]
    passages = {tuple(d[i:j]) for d in corpus for i in range(CONTEXT) for j in range(i + 1, min(CONTEXT, i + 7) + 1)}
    seen = 0
    for number in range(-(-N_LATENTS // facts["latents_per_file"])):
        for record in received(pages, f"latents-{number}"):
            ids = np.frombuffer(base64.b64decode(record["text"]), f"<u{facts['token_bytes']}")
            start = 0
            for _, value, _, length, at, active in record["contexts"]:
                shown = [tokens[i] for i in ids[start : start + length]]
                assert tuple(t[1] if isinstance(t, list) else t for t in shown) in passages
                assert dict(zip(active[::2], active[1::2], strict=True))[at] == value
                start += length
                seen += 1
            assert start == len(ids)
    assert seen > N_LATENTS


def test_special_tokens_and_bytes_are_marked(pages: Path):
    tokens = received(pages, "tokens")
    assert ["special", " the"] in tokens and ["hex", "e381"] in tokens and ["hex", "82"] in tokens


def test_the_index_agrees_with_the_pages(pages: Path):
    index = received(pages, "index")
    assert index["paged"] is None and len(index["count"]) == N_LATENTS
    for record in received(pages, "latents-0"):
        latent = record["id"]
        assert sum(record["histogram"][1]) == sum(record["intervals"][1]) == index["count"][latent]
        if index["count"][latent]:
            best, share, _ = record["categories"][0]
            assert (best, round(share, 3)) == (
                index["category"][latent],
                pytest.approx(index["purity"][latent], abs=2e-3),
            )


def test_a_figure_that_is_no_number_is_null(pages: Path):
    assert received(pages, "summary")["summary"]["eval"] == {"fvu": None, "loss_recovered": None}


def test_a_build_that_fails_leaves_the_old_pages(tmp_path: Path):
    index = write(tmp_path)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in index.parent.rglob("*") if p.is_file()}
    with pytest.raises(KeyError):
        write(tmp_path, decode={}.__getitem__)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in index.parent.rglob("*") if p.is_file()} == before
    write(tmp_path)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """
(async () => {
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  const element = (id) => document.getElementById(id);
  const found = {};
  while (!document.body.classList.contains("ready")) await sleep(20);
  BODY
  await fetch("found", { method: "POST", body: JSON.stringify(found) });
})();
"""


def in_browser(folder: Path, page: str, body: str) -> dict:
    """What a script finds in a page, once it is ready."""
    found: queue.Queue[dict] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    file = folder / page.partition("#")[0]
    (folder / "probe.js").write_text(PROBE.replace("BODY", body))
    file.write_text(file.read_text().replace("</head>", '<script defer src="probe.js"></script></head>'))
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder.parent}/profile"]
        flags += ["--window-size=1200,1600", "--remote-debugging-port=0"]  # stays until it is ended
        line = [str(BROWSER), *flags, f"http://127.0.0.1:{server.server_port}/{page}"]
        browser = subprocess.Popen(line, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            return found.get(timeout=120)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_link_past_the_head_and_a_selection_stay_on_the_latent(pages: Path, tmp_path: Path):
    body = """
  while (!element("next").hasAttribute("href")) await sleep(20);
  found.next = new URL(element("next").href).hash;
  document.querySelector(".skip").click();
  await sleep(100);
  found.skipped = [location.hash, document.activeElement.id, element("number").textContent];
  dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", shiftKey: true }));
  await sleep(100);
  found.selected = location.hash;
  dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  await sleep(100);
  found.stepped = location.hash;
"""
    found = in_browser(shutil.copytree(pages, tmp_path / "pages"), "latent.html#5&sort=max", body)
    assert found["skipped"] == ["#5&sort=max", "contexts", "Latent 5"]
    assert found["selected"] == "#5&sort=max" and found["stepped"] == found["next"] != "#5&sort=max"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_list_keeps_its_search_and_says_one_mistake_until_it_is_over(pages: Path, tmp_path: Path):
    body = """
  const said = () => [...document.querySelectorAll(".message")].map((each) => each.textContent).filter(Boolean);
  const search = (text) => {
    element("query").value = text;
    element("query").dispatchEvent(new Event("input"));
    return sleep(100);
  };
  document.querySelector(".skip").click();
  await sleep(100);
  found.skipped = [location.hash, document.activeElement.id, element("query").value];
  const select = source.select;
  source.select = async () => { throw new Error("The server does not answer."); };
  for (const text of ["a", "b"]) await search(text);
  found.failed = said();
  source.select = select;
  await search("1");
  found.after = said();
  source.select = async (query) => ({ ...(await select(query)), rows: async () => { throw new Error("No rows."); } });
  await search("2");
  found.rows = said();
  source.select = select;
  await search("3");
  found.last = said();
"""
    found = in_browser(shutil.copytree(pages, tmp_path / "pages"), "index.html#q=the&sort=max", body)
    assert found["skipped"] == ["#q=the&sort=max", "latents", "the"]
    assert found["failed"] == ["The server does not answer."] and found["after"] == []
    assert found["rows"] == ["No rows."] and found["last"] == []


class ByteTokenizer:
    """A byte-level tokenizer of five pieces, as Hugging Face writes them."""

    pieces = {0: "Ġthe", 1: "ãģ", 2: "Ĥ", 3: "<0xE3>", 4: "ï¿½"}
    texts = {0: " the", 1: "\ufffd", 2: "\ufffd", 3: "\ufffd", 4: "\ufffd"}

    def decode(self, token_ids: list[int]) -> str:
        return self.texts[token_ids[0]]

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.pieces[ids]


def test_parts_of_characters_become_bytes():
    decode = decoder(ByteTokenizer())
    assert [decode(i) for i in range(5)] == [" the", b"\xe3\x81", b"\x82", b"\xe3", "\ufffd"]
    assert b"".join([decode(1), decode(2)]).decode() == "あ"
