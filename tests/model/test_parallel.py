"""A model that several processes hold gives what one process gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from sae_dist.config import UserError
from sae_dist.model import parallel
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load

HOOKS = ["resid_pre.0", "resid_post.1", "attn_out.2", "mlp_act.2", "mlp_out.3", "model.layers.1.self_attn.q_proj"]
TOKENS = torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(1))


class Member(NamedTuple):
    facts: dict[str, Any]
    states: dict[str, Tensor]


def replica(size: int, folder: Path, **config: Any) -> list[Member]:
    """What each of `size` real processes that hold the model together has."""
    script = Path(__file__).with_name("parallel_child.py")
    processes = []
    for rank in range(size):
        arguments = [str(rank), str(size), str(folder), json.dumps(config), json.dumps(HOOKS)]
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen([sys.executable, str(script), *arguments], stderr=log))
    for rank, process in enumerate(processes):
        assert process.wait(timeout=300) == 0, (folder / f"{rank}.log").read_text()[-3000:]
    return [
        Member(json.loads((folder / f"{r}.json").read_text()), load_file(folder / f"{r}.safetensors"))
        for r in range(size)
    ]


def difference(there: Tensor, here: Tensor) -> float:
    return float((there.float() - here.float()).norm() / here.float().norm())


@pytest.mark.slow
def test_two_processes_give_the_activations_and_the_fingerprint_of_one(tmp_path: Path):
    whole = load(ModelConfig(name="tiny-llama", dtype="float32"))
    expected = whole.capture(TOKENS, HOOKS)
    held = parallel.held_bytes(whole.model)
    for member in replica(2, tmp_path, name="tiny-llama", dtype="float32"):
        assert member.states.keys() == expected.keys()
        for hook, x in expected.items():
            assert member.states[hook].shape == x.shape
            assert difference(member.states[hook], x) < 1e-5, hook  # sums of two halves round otherwise
        assert member.facts["fingerprint"] == whole.fingerprint
        assert member.facts["flop"] == whole.flop_per_token(HOOKS, TOKENS.shape[1])
        embedding = whole.model.get_parameter("model.embed_tokens.weight")
        sharded = held - embedding.numel() * 4  # the plan of Llama leaves the embedding whole
        assert member.facts["held"] < held - 0.49 * sharded


@pytest.mark.slow
def test_heads_that_do_not_divide_leave_attention_whole_and_the_states_right(tmp_path: Path):
    """SmolLM2: 9 heads and 3 of keys and values over two processes; in bf16 within what bf16 rounds a whole one."""
    whole = load(ModelConfig(name="smollm2", dtype="float32"))
    expected = whole.capture(TOKENS, HOOKS)
    (tmp_path / "float32").mkdir()
    for member in replica(2, tmp_path / "float32", name="smollm2", dtype="float32"):
        for hook, x in expected.items():
            assert difference(member.states[hook], x) < 1e-5, hook
        assert member.facts["fingerprint"] == whole.fingerprint
        assert member.facts["held"] < 0.75 * parallel.held_bytes(whole.model)
    (tmp_path / "bfloat16").mkdir()
    rounded = load(ModelConfig(name="smollm2", dtype="bfloat16")).capture(TOKENS, HOOKS)
    for member in replica(2, tmp_path / "bfloat16", name="smollm2", dtype="bfloat16"):
        for hook, x in expected.items():
            own = difference(rounded[hook], x)
            assert difference(member.states[hook], x) < 1.5 * own + 1e-6, hook


def test_a_family_without_a_plan_and_a_split_nobody_can_make_are_refused():
    with pytest.raises(UserError, match="no tensor-parallel plan for GPT2LMHeadModel.*device_map"):
        parallel.sharding(load(ModelConfig(name="tiny-gpt2")).model.config, 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"), [(9, 3, [1, 3]), (8, 2, [1, 2]), (12, 12, [1, 2, 3, 4, 6, 12])]
)
def test_sizes_that_divide_the_heads(heads: int, kv_heads: int, sizes: list[int]):
    config = LlamaConfig(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert parallel.dividing(config) == sizes
    assert parallel.undivided_heads(config, 5)


def test_what_is_whole_is_not_gathered_and_slices_are_as_large_as_the_first():
    assert parallel._slices(10, 4) == [3, 3, 3, 1]
    assert parallel._slices(9, 4) == [3, 3, 3, 0]
    x = torch.ones(2, 3)
    assert parallel.gather_last_dim(x, 3) is x
