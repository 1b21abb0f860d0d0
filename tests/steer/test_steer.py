"""`sae-dist steer` on a small run: samples, losses, attribution and search, their page, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_dist.cli.main import main
from sae_dist.steer import sample, study
from sae_dist.steer.activity import of_pages
from tests.steer.worlds import LANGUAGE_MODEL, MODEL, random_dictionary, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("steered") / "run")


def steer(run: Path, out: Path, *words: str) -> dict:
    few = ["samples=2", "max_tokens=6", "loss_sequences=3", "tokens=2000"]
    assert main(["steer", str(run), f"out={out}", *few, *words]) == 0
    return json.loads((out / "steer.json").read_text())


def latent_of(run: Path) -> int:
    return int(of_pages(run / "pages").maximum.argmax())


def test_samples_with_and_without_stand_beside_vectors_of_the_same_norm(run, tmp_path, capsys):
    latent, words = latent_of(run), ["prompt=0123<b>", "toward=cat:letters", 'logits=[a, "7"]']
    found = steer(run, tmp_path / "a", f"clamp={{{latent}: 3x}}", *words)
    assert list(found["conditions"]) == [study.WITHOUT, study.CLAMPED, study.DIFFERENCE, study.RANDOM]
    activity, W_dec = of_pages(run / "pages"), random_dictionary("resid_post.1").parameters.W_dec
    (clamped,) = found["clamped"]
    assert clamped["value"] == pytest.approx(3 * float(activity.maximum[latent]))
    norm = float((clamped["value"] - activity.mean[latent]) * W_dec[latent].norm())
    assert found["norm"] == pytest.approx(norm, rel=1e-4) and found["random_latent"] != latent
    assert all(len(one["samples"]) == 2 for one in found["conditions"].values())
    losses = {name: one["loss"] for name, one in found["conditions"].items()}
    assert len(set(losses.values())) == 4 and set(found["conditions"][study.CLAMPED]["logits"]) == {"a", "7"}
    own = found["attribution"]
    assert own["of"] == ["a", "7"] and len(own["latents"]) > 3 and own["rank_correlation"] is not None
    page = (tmp_path / "a/index.html").read_text()
    assert "0123&lt;b&gt;" in page and "<b>" not in page and "<script" not in page
    said = capsys.readouterr().out
    assert f"is held at 3x = {clamped['value']:.4g}" in said and "index.html" in said
    again = steer(run, tmp_path / "b", f"clamp={{{latent}: 3x}}", *words)
    assert again["conditions"] == found["conditions"]  # the same seed, the same samples


def test_a_clamp_at_what_a_silent_latent_has_changes_nothing(run, tmp_path):
    g = of_pages(run / "pages").maximum
    silent = int(g.argmin())
    found = steer(run, tmp_path, f"clamp={{{silent}: 0}}", "prompt=zz", "at=new")["conditions"]
    if float(g[silent]) == 0:
        assert found[study.CLAMPED]["loss"] == pytest.approx(found[study.WITHOUT]["loss"], abs=1e-6)
    assert found[study.CLAMPED]["next"] == found[study.WITHOUT]["next"]  # at=new leaves the prompt as it is


def test_what_was_sampled_before_a_stop_is_kept(run, tmp_path):
    words = [f"clamp={{{latent_of(run)}: 2x}}", "prompt=12"]
    found = steer(run, tmp_path, *words)
    marked = found | {"conditions": {study.WITHOUT: found["conditions"][study.WITHOUT] | {"loss": 123.0}}}
    (tmp_path / "steer.json").write_text(json.dumps(marked))  # as it is when a stop comes after the first condition
    again = steer(run, tmp_path, *words)["conditions"]
    assert again[study.WITHOUT]["loss"] == 123.0
    assert again[study.CLAMPED] == found["conditions"][study.CLAMPED]
    other = steer(run, tmp_path, *words, "seed=1")["conditions"]
    assert other[study.WITHOUT]["loss"] == found["conditions"][study.WITHOUT]["loss"]


def test_the_tokens_that_a_latent_reads_from(run, tmp_path, capsys):
    latent, silent = latent_of(run), int(of_pages(run / "pages").maximum.argmin())
    found = steer(run, tmp_path, "prompt=0123456789<abcdef", f"sources=[{latent},{silent}]")
    own, other = found["sources"]
    assert found["prompt_tokens"][1:4] == ["0", "1", "2"] and len(own["by_token"]) == len(found["prompt_tokens"])
    assert own["position"] >= 1 and own["layer"] == 1 and len(own["heads"]) == 3
    total = own["stream"] + own["mlp"] + own["bias"] + sum(own["by_token"])
    assert total == pytest.approx(own["pre_activation"], abs=1e-4) == pytest.approx(own["value"], abs=1e-3)
    page, said = (tmp_path / "index.html").read_text(), capsys.readouterr().out
    assert "What latents read from" in page and "by attention of layer 1" in page and "&lt;" in page
    assert f"Latent {latent}" in said and "its pre-activation is" in said
    if other["position"] is None:
        assert "silent on the prompt" in page and "is silent on the prompt" in said


def test_latents_are_found_by_example(run, tmp_path, capsys):
    found = steer(run, tmp_path, "toward=cat:digits", "shown=5")["search"]
    assert found["significant"] >= 1 and found["latents"][0]["q"] < 0.05 < 0.5 < found["latents"][0]["auc"]
    by_text = steer(run, tmp_path, 'toward=["01234567", "98765432"]', "away=[abcdefgh, hgfedcba]")["search"]
    assert by_text["documents"] == [2, 2]
    assert "tell the texts apart" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_of_a_prompt_runs(run):
    notebook = Path(__file__).parents[2] / "docs/notebook_prompt.py"
    done = subprocess.run([sys.executable, notebook, run], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *latents, losses = done.stdout.splitlines()
    assert len(latents) == 5 and all(f"{run}/pages/latent.html#" in line for line in latents)
    clean, spliced = re.fullmatch(r"loss (.*), with the reconstruction (.*)", losses).groups()
    assert 0 < float(clean) < 20 and float(spliced) != float(clean)


def test_samples_are_those_of_the_model_and_end_where_it_ends():
    prompt = sample.prompt_tokens(LANGUAGE_MODEL, "ab", 0)
    written = sample.write(LANGUAGE_MODEL, prompt, samples=3, max_tokens=5, temperature=0, seed=0)
    with torch.no_grad():
        logits = MODEL(input_ids=written[:, :-1]).logits[:, len(prompt) - 1 :]
    assert torch.equal(logits.argmax(-1)[0, :1], written[0, len(prompt) : len(prompt) + 1])
    one, two = (sample.write(LANGUAGE_MODEL, prompt, samples=2, max_tokens=8, temperature=1.0, seed=s) for s in (0, 1))
    assert not torch.equal(one[:, :8], two[:, :8])
    (ended,) = sample.read(LANGUAGE_MODEL, torch.tensor([[*prompt.tolist(), 65, 66, 0, 67]]), len(prompt))
    assert ended.text == LANGUAGE_MODEL.tokenizer.decode([65, 66])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a", "clamp={64: 1}"], "clamp has latent 64, but the dictionary has 64 latents"),
        (["prompt=a", "clamp={3: loud}"], "clamp={3: loud} is not understood; give a value"),
        (["prompt=a", "clamp={three: 1}"], "clamp.three"),
        (["clamp={3: 1}"], "prompt is missing; clamp= needs prompt="),
        (["prompt=' '", "clamp={3: 1}"], "prompt is empty"),
        (["prompt=a"], "there is nothing to do"),
        (["sources=[3]"], "prompt is missing; sources= needs prompt="),
        (["prompt=a", "sources=[64]"], "sources has latent 64, but the dictionary has 64 latents"),
        (["toward=cat:poems"], "cat:poems is no category of the run's text; it has digits, letters"),
        (["away=x", "prompt=a", "clamp={3: 1}"], "away= is given without toward="),
        (["prompt=a", "logits=[ab]"], "logits: 'ab' is 2 tokens of tiny-llama ('a' 'b'); give one token"),
        (["prompt=a", "clamp={3: 1}", "at=[5,2]"], "at=[5, 2] is no span"),
        (["prompt=a", "clamp={3: 1}", "dictionary=other"], "dictionary=other is not in run="),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, message):
    assert main(["steer", str(run), f"out={tmp_path}", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and said.startswith("error:")


def test_a_run_without_a_model_or_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("store: s\n")
    for run, message in ((tmp_path, "it has no model to steer"), (tmp_path / "none", "config.yaml is missing")):
        assert main(["steer", str(run), "prompt=a", "clamp={3: 1}"]) == 2
        assert message in capsys.readouterr().err
