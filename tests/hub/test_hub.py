"""Dictionaries on the Hugging Face Hub, which here is a server that speaks its protocol and keeps a record."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from sae_dist.cli.main import main
from sae_dist.run_files import write_json, write_whole
from sae_dist.sae import dictionary as own
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.find import FILES
from sae_dist.sae.initialize import Parameters
from tests.formats.dictionaries import dictionary
from tests.hub.server import OTHER_TOKEN, PART, TOKEN, Hub, Repository, git_hash

N, D = 512, 64
FIGURES = {"tokens": 4096, "fvu": 0.23456789, "l0": 15.5, "dead_fraction": 0.125, "loss_recovered": None}
SUMMARY = {
    "name": "run", "config_hash": "c", "store": "/home/alice/store", "hook": "resid_post.3", "dictionary": "d",
    "n_latents": N, "d_model": D, "k": 8, "tokens_trained": 81920, "steps": 20, "wall_seconds": 1.0,
    "tokens_per_second": 1.0, "order_hash": "0", "eval": FIGURES,
    "also": [{"name": "wide", "dictionary": "w", "n_latents": N, "k": 8, "lr": 0.5, "eval": FIGURES | {"fvu": 0.5}}],
}  # fmt: skip


class Answer(NamedTuple):
    code: Any
    out: str
    err: str


class Child:
    """A process whose Hub is the server of the test."""

    def __init__(self, hub: Hub, home: Path) -> None:
        mine = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), "SAE_DIST_CACHE": str(home / "cache"),
            "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | mine
        self.log, self.said = home / "log", ""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.hub.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=environment, cwd=Path(__file__).parents[2],
            )  # fmt: skip

    def _ask(self, **request: Any) -> Answer:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.said += line
        return Answer(**json.loads(line))

    def command(self, *words: str, token: str = TOKEN) -> Answer:
        return self._ask(command=words, environment={"HF_TOKEN": token})

    def python(self, code: str) -> Answer:
        return self._ask(code=code, environment={"HF_TOKEN": TOKEN})

    def refused(self, *words: str, token: str = TOKEN) -> str:
        """The one line of a command that was refused."""
        answer = self.command(*words, token=token)
        assert answer.code == 2 and answer.err.count("\n") == 1 and answer.err.startswith("error: "), answer
        return answer.err

    def close(self) -> None:
        with self.process:  # closes its input, and waits
            pass


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def child(hub, home):
    process = Child(hub, home)
    yield process
    process.close()


def save(folder: Path, *, seed: int, n: int = N, d: int = D) -> None:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=g) for shape in ((n, d), (n, d), (n,), (d,))]
    info = {"variant": "topk", "hook": "resid_post.3", "model": "some/model", "n_latents": n, "d_model": d,
            "seed": 7, "tokens_trained": 81920}  # fmt: skip
    own.save(Dictionary(parameters=Parameters(tensors[0].T, *tensors[1:]), k=8, info=info), folder)


@pytest.fixture(scope="module")
def run(home):
    """The folder of a finished run of two dictionaries, whose files have several parts each."""
    save(home / "run/dictionary", seed=0)
    save(home / "run/dictionaries/wide", seed=1)
    write_json(home / "run/summary.json", SUMMARY)
    write_whole(home / "run/config.yaml", yaml.safe_dump({"train": {"lr": 0.0125, "batch": 4096}}))
    return home / "run"


@pytest.fixture(scope="module")
def pushed(child, run):
    """What pushing the run to me/first said."""
    return child.command("export", str(run), "to=hf://me/first", "license=mit")


def weights(repository: Repository) -> bytes:
    return repository.at("main")[1]["dictionary.safetensors"]


def test_what_is_pushed_is_pulled_bit_by_bit(hub, child, run, pushed, home):
    assert pushed.code == 0 and f"{hub.endpoint}/me/first  private, commit" in pushed.out
    there = hub.files("me/first")
    assert set(there) == {".gitattributes", "README.md", *FILES} and hub.repositories["me/first"].private
    assert child.command("import", "path=hf://me/first", f"out={home}/back").code == 0
    for name in FILES:
        assert there[name] == (run / "dictionary" / name).read_bytes() == (home / "back" / name).read_bytes()
    before = len(hub.downloads)
    code = f"""
import sae_dist, torch
found, expected = sae_dist.load("hf://me/first"), sae_dist.load({str(run)!r})
assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
"""
    assert child.python(code).code == 0
    assert len(hub.downloads) == before  # it was there by now


def test_nothing_that_is_said_or_sent_elsewhere_has_the_token(hub, child, pushed):
    assert pushed.code == 0 and hub.leaked == []
    said = (child.said + child.log.read_text()).encode()
    for text in (said, *hub.files("me/first").values()):
        assert TOKEN.encode() not in text and b"s3cr3t" not in text


def test_the_card_has_figures_recipe_tags_and_code_that_runs(hub, child, pushed):
    assert pushed.code == 0
    text = hub.files("me/first")["README.md"].decode()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head.pop("tags") == ["sparse-autoencoder", "mechanistic-interpretability"]
    assert head == {"library_name": "sae_dist", "license": "mit", "base_model": "some/model"}
    for line in (
        "variance unexplained | 0.2346 |", "active latents a token | 15.5 |", "share of latents | 0.125 |",
        "loss recovered | not measured |", "held-out tokens measured on | 4,096 |", "| kind | topk |", "| k | 8 |",
        "| n_latents | 512 |", "| lr | 0.0125 |", "| steps | 20 |", "| batch | 4096 |",
    ):  # fmt: skip
        assert line in text, line
    assert "512 latents, of `resid_post.3` of some/model" in text and "alice" not in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert child.python(f"import torch\nx = torch.randn(3, {D})\n{code[0]}\nassert x_hat.shape == x.shape").code == 0


def test_a_dry_run_shows_the_card_and_sends_nothing(hub, child, run):
    before = len(hub.requests)
    shown = child.command("export", str(run / "dictionaries/wide"), "to=hf://me/none", "dry_run=true", token="")
    assert shown.code == 0 and len(hub.requests) == before
    assert "variance unexplained | 0.5 |" in shown.out and "| lr | 0.5 |" in shown.out
    assert (
        f"dictionary.safetensors  {(run / 'dictionaries/wide/dictionary.safetensors').stat().st_size:,} bytes"
        in shown.out
    )


def test_a_dry_run_shows_the_paths_that_config_json_says(child, home):
    save(home / "plain", seed=3)
    found = own.load(home / "plain")
    began = {"dictionary": "/home/alice/runs/a", "weights": "0"}
    told = {"model": "/home/alice/acme-ft", "store": "/home/alice/store", "started_from": began}
    own.save(dataclasses.replace(found, info={**found.info, **told}), home / "told")
    shown = child.command("export", f"{home}/told", "to=hf://me/none", "dry_run=true", token="")
    said = [line for line in shown.out.splitlines() if line.startswith("config.json says a path of this machine: ")]
    assert sorted(line.split(": ")[1] for line in said) == [
        "model=/home/alice/acme-ft", "started_from.dictionary=/home/alice/runs/a", "store=/home/alice/store"
    ]  # fmt: skip
    other = child.command("export", f"{home}/told", "format=sparsify", "to=hf://me/none/a", "dry_run=true", token="")
    assert other.code == 0 and "alice" not in other.out  # it does not say them


def test_an_upload_whose_connection_breaks_goes_on_with_that_part(hub, child, run):
    hub.uploads.clear()
    hub.cut_upload = (2, 1000)
    assert child.command("export", str(run / "dictionaries/wide"), "to=hf://me/cut").code == 0
    data = weights(hub.repositories["me/cut"])
    whole = [each.start for each in hub.uploads if each.whole]
    assert whole == list(range(0, len(data), PART))  # each part arrived once
    assert [(each.start, each.count) for each in hub.uploads if not each.whole] == [(2 * PART, 1000)]


def test_a_push_that_failed_sends_no_file_twice(hub, child, run):
    for folder, to in (("dictionary", "me/first"), ("dictionaries/wide", "me/late")):
        hub.uploads.clear()
        if to == "me/late":
            hub.large.clear()
            hub.refuse["/api/models/me/late/commit"] = (500, "out of order")
            said = child.refused("export", str(run / folder), f"to=hf://{to}")
            assert "answers 500 (out of order); repeat the command, which goes on" in said
            assert sum(each.count for each in hub.uploads) == (run / folder / "dictionary.safetensors").stat().st_size
            hub.uploads.clear()
            hub.refuse.clear()
        assert child.command("export", str(run / folder), f"to=hf://{to}").code == 0
        assert hub.uploads == []
        assert weights(hub.repositories[to]) == (run / folder / "dictionary.safetensors").read_bytes()


@pytest.mark.parametrize("down", [False, True])
def test_a_download_whose_connection_breaks_goes_on_there(hub, child, home, down):
    name = f"me/broken{down:d}"
    save(home / name / "sent", seed=int(down), n=6144, d=256)  # 12.6 MB: what arrives is written in pieces of 10
    files = {path.name: path.read_bytes() for path in (home / name / "sent").iterdir()}
    hub.repositories[name] = Repository(private=True)
    hub.repositories[name].commit("main", files)
    hub.downloads.clear()
    hub.cut_download = 11_000_000
    words = ("import", f"path=hf://{name}", f"out={home}/{name}/back")
    if down:  # the server is gone for longer than the command asks again
        hub.refuse["/cdn"] = (503, "down")
        assert "answers 503 (down); repeat the command, which goes on" in child.refused(*words)
        hub.refuse.clear()
    assert child.command(*words).code == 0
    data = files["dictionary.safetensors"]
    oid = hashlib.sha256(data).hexdigest()
    first, second = (each for each in hub.downloads if each.what == oid)
    assert not first.whole and second.whole
    assert 0 < second.start <= 11_000_000 and second.start + second.count == len(data)
    assert (home / name / "back/dictionary.safetensors").read_bytes() == data


def test_a_file_that_arrives_damaged_is_not_kept(hub, child, home, pushed):
    sha, files = hub.repositories["me/first"].at("main")
    damaged = Repository(private=False)
    sha = damaged.commit("main", dict(files))
    hub.repositories["me/damaged"] = damaged
    right, place = files["config.json"], f"out={home}/damaged"
    hub.listing = lambda listed: [
        each | {"oid": git_hash(right)} if each["path"] == "config.json" else each for each in listed
    ]
    damaged.commits[sha]["config.json"] = right.replace(b"resid_post.3", b"resid_post.4")
    assert "config.json arrived damaged" in child.refused("import", "path=hf://me/damaged", place)
    damaged.commits[sha]["config.json"] = right
    assert child.command("import", "path=hf://me/damaged", place).code == 0
    hub.listing = lambda listed: listed


def test_paths_of_a_listing_lead_nowhere_else(hub, child, home, pushed):
    _, files = hub.repositories["me/first"].at("main")
    hub.repositories["me/evil"] = Repository(private=False)
    hub.repositories["me/evil"].commit("main", dict(files))
    evil = ["../../../evil.json", "layer_../../../evil.safetensors", "/evil.json", "layer_\x1b[31m.safetensors"]
    hub.listing = lambda listed: [{"type": "file", "path": path, "size": 3, "oid": "0" * 40} for path in evil]
    said = child.refused("import", "path=hf://me/evil", "format=circuit_tracer", f"out={home}/evil")
    assert "has no config.yaml or layer_*.safetensors" in said and "\x1b" not in said
    hub.listing = lambda listed: listed
    assert not [*home.rglob("evil*.json"), *home.rglob("evil*.safetensors"), *home.rglob("layer_*")]


def test_other_formats_have_folders_cards_and_a_front_page(hub, child, run, home):
    assert "SAELens loads from folders" in child.refused("export", str(run), "format=saelens", "to=hf://me/lens")
    to = "hf://me/lens@v2/blocks.3"
    assert child.command("export", str(run), "format=saelens", f"to={to}", "private=false").code == 0
    there = hub.files("me/lens", "v2")
    assert set(there) == {".gitattributes", "README.md", *(f"blocks.3/{name}" for name in
                          ("README.md", "cfg.json", "sae_weights.safetensors"))}  # fmt: skip
    assert set(hub.files("me/lens")) == {".gitattributes"} and not hub.repositories["me/lens"].private
    for card in ("README.md", "blocks.3/README.md"):
        head = yaml.safe_load(there[card].decode().split("---\n")[1])
        assert head["library_name"] == "saelens" and "saelens" in head["tags"]
    assert 'SAE.from_pretrained("me/lens", "blocks.3"' in there["blocks.3/README.md"].decode()
    words = ("import", "format=saelens", f"path={to}", f"out={home}/lens")
    assert child.command(*words, token=OTHER_TOKEN).code == 0  # it is public
    found = own.load(home / "lens")
    assert found.info["imported"]["from"] == f"hf://me/lens@{hub.repositories['me/lens'].branches['v2']}/blocks.3"
    x = torch.randn(9, D)
    torch.testing.assert_close(found.reconstruct(x), own.load(run / "dictionary").reconstruct(x), rtol=1e-4, atol=1e-3)


def test_one_file_of_a_set_is_pulled_alone(hub, child, home):
    layer = dictionary("jumprelu", transcodes=True)
    own.save(dataclasses.replace(layer, info={**layer.info, "n_latents": layer.n_latents}), home / "layer")
    assert child.command("export", f"{home}/layer", "format=circuit_tracer", "to=hf://me/set/all").code == 0
    files = hub.files("me/set")
    files["all/layer_4.safetensors"] = b"of another layer"
    hub.downloads.clear()
    words = ("import", "format=circuit_tracer", f"out={home}/one")
    assert child.command(*words, "path=hf://me/set/all/layer_3.safetensors").code == 0
    assert hub.downloads and not [each for each in hub.downloads if each.count == len(b"of another layer")]
    assert own.load(home / "one").info["target_hook"] == "mlp_out.3"


REFUSED = {  # words of a command, the token, and what it says
    "no name": ("import path=hf://me out=o", TOKEN, "path=hf://me names no model repository; write hf://OWNER/NAME"),
    "a data set": ("import path=hf://datasets/me/x out=o", TOKEN, "names no model repository"),
    "letters": ("import path=hf://me/a--b out=o", TOKEN, "me/a--b cannot be a repository"),
    "dots": ("import path=hf://me/x/../y out=o", TOKEN, "../y cannot be a folder of a repository"),
    "gone": ("import path=hf://me/gone out=o", TOKEN, "there is no such repository, or it is private"),
    "private": ("import path=hf://me/first out=o", OTHER_TOKEN, "there is no such repository, or it is private"),
    "revision": ("import path=hf://me/first@v9 out=o", TOKEN, "the repository has no revision v9; give a branch"),
    "folder": ("import path=hf://me/first/sub out=o", TOKEN, "the repository has no sub; see http://127.0.0.1"),
    "other files": ("import path=hf://me/first format=saelens out=o", TOKEN, "has no cfg.json or sae_weights"),
    "pickle": ("import path=hf://me/first format=openai out=o", TOKEN, "*.pt is a kind of file that can hold code"),
    "nobody": ("export RUN to=hf://me/x", "", "nobody is logged in on the Hub; log in by `hf auth login`, or set HF_"),
    "token": ("export RUN to=hf://me/x", "hf_wrong", "does not accept the token (Invalid credentials in Authoriza"),
    "not mine": ("export RUN to=hf://them/x", TOKEN, "the token does not allow that (you may not write to them)"),
    "public": ("export RUN to=hf://me/open", TOKEN, "the repository is public; say private=false if that is meant"),
    "licence": ("export RUN to=hf://me/x license=mine", TOKEN, '"license" must be one of the list'),
    "local": ("export RUN to=OUT license=mit", TOKEN, "private, license, card and dry_run are for to=hf://"),
    "names": ("export RUN to=OUT hook_name=h", TOKEN, "hook_name=h means nothing to format=sae_dist"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_each_mistake_is_one_line(hub, child, run, pushed, home, case):
    line, token, said = REFUSED[case]
    assert pushed.code == 0
    hub.repositories.setdefault("me/open", Repository(private=False)).commit("main", {})
    words = [
        {"RUN": str(run), "to=OUT": f"to={home}/out", "out=o": f"out={home}/o"}.get(word, word) for word in line.split()
    ]
    assert said in child.refused(*words, token=token)
    assert not (home / "o").exists() and not (home / "out").exists()


def test_without_a_way_to_the_hub_there_is_one_line(monkeypatch, tmp_path, capsys):
    line = ["import", "path=hf://me/first", f"out={tmp_path}/o"]
    for said in ("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it", "http://127.0.0.1:9 cannot be reached"):
        assert main(line) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_local_export_in_its_own_format_is_a_copy(run, tmp_path):
    assert main(["export", str(run), f"to={tmp_path}/copy"]) == 0
    for name in FILES:
        assert (tmp_path / "copy" / name).read_bytes() == (run / "dictionary" / name).read_bytes()
    assert main(["import", f"path={tmp_path}/copy", f"out={tmp_path}/again"]) == 0
    assert own.load(tmp_path / "again").info == own.load(run / "dictionary").info
