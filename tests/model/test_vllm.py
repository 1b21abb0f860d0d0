"""The vLLM engine against a stand-in for vLLM's interface: tokens in, a safetensors file a sequence out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_dist.config import UserError
from sae_dist.model import tiny
from sae_dist.model.config import ModelConfig
from sae_dist.model.engine import open_engine
from sae_dist.model.vllm import VllmEngine

TOKENS = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(2))


class StandIn:
    """Gives the inputs of the layers asked for, in their order, as `vllm.LLM` with extract_hidden_states does."""

    def __init__(self, lost: int = 0, **options: Any) -> None:
        self.options, self.lost = options, lost
        self.model = tiny.model("tiny-llama")
        self.model.model.norm = torch.nn.Identity()  # the last hidden state is the last layer's output
        drafter = options["speculative_config"]["draft_model_config"]["hf_config"]
        self.layers = drafter["eagle_aux_hidden_state_layer_ids"]
        self.folder = Path(options["kv_transfer_config"]["kv_connector_extra_config"]["shared_storage_path"])

    @torch.no_grad()
    def generate(self, prompts: Sequence[Mapping[str, Sequence[int]]], **options: Any) -> list[SimpleNamespace]:
        assert options["sampling_params"] == "one token"
        outputs = []
        for i, prompt in enumerate(prompts):
            ids = torch.tensor(prompt["prompt_token_ids"])
            hidden = self.model.model(ids[None], output_hidden_states=True).hidden_states
            states = torch.stack([hidden[layer][0] for layer in self.layers], dim=1)
            path = self.folder / f"{i}.safetensors"
            save_file({"hidden_states": states[self.lost :].contiguous(), "token_ids": ids}, path)
            outputs.append(
                SimpleNamespace(prompt_token_ids=ids.tolist(), kv_transfer_params={"hidden_states_path": str(path)})
            )
        return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.model("tiny-llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def engine(folder: Path, started: list[StandIn], **faults: int) -> VllmEngine:
    def start(**options: Any) -> tuple[Any, str]:
        started.append(StandIn(**faults, **options))
        return started[-1], "one token"

    return VllmEngine(ModelConfig(name=str(folder), dtype="float32"), start)


def test_its_states_are_those_of_hugging_face_and_nothing_is_left_in_the_way(folder: Path):
    started: list[StandIn] = []
    ours = engine(folder, started)
    hooks = ["resid_post.2", "resid_pre.0", "resid_post.3"]
    got = ours.capture(TOKENS, hooks)
    expected = open_engine(ModelConfig(name=str(folder), dtype="float32")).capture(TOKENS, hooks)
    assert list(got) == hooks
    for hook in hooks:
        assert torch.allclose(got[hook], expected[hook], rtol=1e-5, atol=1e-5), hook  # batches of one round otherwise
    assert ours.width("resid_post.2") == 32
    options = started[0].options
    assert options["enable_prefix_caching"] is False and options["enable_chunked_prefill"] is False
    assert started[0].layers == [0, 3, 4]  # resid_post.L is the input of layer L + 1
    assert not list(started[0].folder.iterdir())
    ours.capture(TOKENS[:1], ["resid_post.2"])
    assert len(started) == 1


def test_a_state_that_is_missing_stops_it(folder: Path):
    with pytest.raises(RuntimeError, match="8 states for 9 tokens.*prefix caching"):
        engine(folder, [], lost=1).capture(TOKENS, ["resid_post.0"])


def test_what_it_cannot_give_is_refused_with_what_it_can(folder: Path):
    ours = engine(folder, [])
    with pytest.raises(UserError, match="hook=mlp_out.1 with model.engine=vllm: it gives resid_pre.L.*0 to 3"):
        ours.width("mlp_out.1")
    with pytest.raises(UserError, match="resid_post.4"):
        ours.width("resid_post.4")
    ours.capture(TOKENS, ["resid_post.0"])
    with pytest.raises(UserError, match="cannot give"):
        ours.capture(TOKENS, ["resid_post.1"])
    with pytest.raises(UserError, match="model.device_map"):
        VllmEngine(ModelConfig(name=str(folder), device_map="auto"), lambda **options: (None, options))  # type: ignore[arg-type,return-value]


def test_the_fingerprint_knows_weights_dtype_and_engine(folder: Path, tmp_path: Path):
    first = engine(folder, []).fingerprint
    assert first == engine(folder, []).fingerprint
    assert first != open_engine(ModelConfig(name=str(folder), dtype="float32")).fingerprint
    model = tiny.model("tiny-llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert engine(tmp_path, []).fingerprint != first


def test_without_vllm_it_says_how_to_get_it():
    with pytest.raises(UserError, match="pip install vllm.*model.engine=hf"):
        open_engine(ModelConfig(name="smollm2", engine="vllm"))
