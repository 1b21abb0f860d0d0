"""The plan: numbers worked by hand, what it refuses, and that every description in conf/ is one."""

import json

import pytest
from sae_kernels.row_state import StateOptions
from transformers import BertConfig, LlamaConfig, MambaConfig

from sae_dist.cli.compose import compose, options
from sae_dist.cli.main import main
from sae_dist.config import UserError, load
from sae_dist.plan.cost import HarvestedModel, cost, harvest_flop, store_bytes
from sae_dist.plan.machine import Machine
from sae_dist.plan.memory import memory, state_bytes
from sae_dist.plan.plan import plan, smallest_mesh, splits
from sae_dist.plan.seconds import amounts, phases, reading_s
from sae_dist.plan.workload import Workload, check
from sae_dist.sae.config import TopK

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MACHINES = [name for name in options("machine") if name != "here"]
BIG = Workload(sae=TopK(n_latents=2**25, k=64, k_aux=2048), d_model=4096, batch=131_072, steps=10)


def machine(name="h100", **changed):
    return load(Machine, compose("plan", [f"machine={name}"])["machine"] | changed)


@pytest.mark.parametrize(
    ("target", "name"), [*((target, "h100") for target in options("target")), *(("4M", name) for name in MACHINES)]
)
def test_every_target_is_planned_on_every_machine_or_refused_with_a_mesh_that_fits(name, target, capsys):
    code = main(["plan", f"target={target}", f"machine={name}", "json=true"])
    said = capsys.readouterr()
    if code == 0:
        found = json.loads(said.out)
        assert found["device_bytes"] <= found["machine"]["memory"]
        assert found["step_s"] >= max(phase["seconds"] for phase in found["phases"])
    else:
        assert code == 2
        assert "mesh.feature=" in said.err


def test_34_million_latents_need_4_4_terabytes_of_fp32_adam():
    """275 billion parameters, 16 bytes each (weights, both moments, and the gradient that is never stored: 12)."""
    assert BIG.parameters == pytest.approx(274.9e9, rel=1e-3)
    assert state_bytes(BIG) == pytest.approx(4.4e12 * 12 / 16, rel=1e-2)
    smallest = smallest_mesh(BIG, machine())
    assert 3.3e12 / 85e9 < smallest.feature <= 64  # more than the state alone takes; the table of science.md says 64


def test_a_rank_holds_what_its_tensors_are():
    work = Workload(sae=TopK(n_latents=1000, k=4, k_aux=0), d_model=64, batch=128, feature=4)
    parts = {part.name: part.bytes for part in memory(work, machine())}
    numbers = 2 * 250 * 64 + 250 + 64
    assert parts["parameters, fp32"] == 4 * numbers
    assert parts["Adam's moments, fp32"] == 8 * numbers
    assert parts["W_enc, bf16 copy"] == 2 * 250 * 64


def test_a_compact_state_is_what_its_tensors_are_and_bf16_weights_need_no_copy():
    """Of 512 dimensions two blocks of 256 have a scale each."""
    plain = Workload(sae=TopK(n_latents=1000, k=4, k_aux=0), d_model=512, batch=128, feature=4)
    rows, biases = 2 * 250, 250 + 512
    for state, named, by_hand in (
        (StateOptions("bfloat16_stochastic", "int8"), "Adam's moments, 8-bit", 2 * rows * (512 + 2 * 4)),
        (
            StateOptions("bfloat16_stochastic", "factored"),
            "Adam's moments, factored",
            rows * (512 + 2 * 4) + 4 * rows + 2 * 4 * 512,
        ),
    ):
        parts = {part.name: part.bytes for part in memory(plain._replace(state=state), machine())}
        assert parts["parameters, bf16"] == 2 * rows * 512 + 4 * biases
        assert parts[named] == by_hand + 8 * biases
        assert "W_enc, bf16 copy" not in parts
        on_cpu, odd = (
            {part.name: part.bytes for part in memory(plain._replace(state=state, d_model=d), machine(backend="cpu"))}
            for d in (512, 511)
        )
        assert "W_enc, bf16 copy" not in on_cpu and odd["W_enc, bf16 copy"] == 2 * 250 * 512
        assert parts["checkpoint: copy while written"] == parts["parameters, bf16"] + parts[named] + 8 * 250
    mixed = plain._replace(state=StateOptions("bfloat16_stochastic"), others=(plain,))
    parts = {part.name: part.bytes for part in memory(mixed, machine())}
    assert parts["parameters, fp32"] == 4 * (rows * 512 + biases)
    assert parts["parameters, bf16"] == 2 * rows * 512 + 4 * biases
    assert parts["W_enc, bf16 copy"] == 2 * 250 * 512


def test_the_keys_of_a_compact_state_are_planned(capsys):
    found = {}
    for keys in ([], ["train.parameters=bfloat16_stochastic", "train.moments=factored"]):
        assert main(["plan", "target=4M", "mesh.feature=16", "json=true", *keys]) == 0
        found[len(keys)] = json.loads(capsys.readouterr().out)
    assert found[2]["work"]["state"]["moments"] == "factored"
    assert found[2]["device_bytes"] < 0.7 * found[0]["device_bytes"]
    assert found[2]["step_s"] > found[0]["step_s"]


def test_the_product_is_two_operations_a_weight_and_row_of_which_each_rank_has_its_share():
    """36.4 GPU-seconds at the full rate of an H100: 2 x 131,072 x 4,096 x 2^25 / 989e12 (science.md, section 3)."""
    assert amounts(BIG, "triton")["product"] / 989e12 == pytest.approx(36.4, rel=2e-3)
    split = BIG.on_mesh(data=2, feature=32)
    assert amounts(split, "triton")["product"] * 64 == amounts(BIG, "triton")["product"]


def test_storing_forty_billion_rows_takes_328_terabytes_and_half_in_eight_bits():
    assert store_bytes(40 * 10**9, 4096, 2) == pytest.approx(328e12, rel=3e-3)
    assert store_bytes(40 * 10**9, 4096, 1) == pytest.approx(164e12, rel=6e-3)


def test_harvesting_costs_two_operations_a_parameter_and_position():
    assert harvest_flop(HarvestedModel(8e9, 128, kept=0.5), rows=10) == 2 * 8e9 * 20


def test_the_price_is_hours_times_the_rate():
    work = BIG.on_mesh(data=1, feature=64)._replace(steps=3600, store_rows=10**9)
    found = cost(work, machine(device_hour=2.0), None, tokens_per_second=131_072.0, storage_tb_month=20.0)
    assert found.train_device_hours == pytest.approx(64.0)
    assert found.device_price == pytest.approx(128.0)
    assert found.storage_price_month == pytest.approx(20 * (4096 * 2 + 16) / 1000)


def test_a_run_that_cannot_read_fast_enough_is_bound_by_reading():
    small = Workload(sae=TopK(n_latents=16_384, k=64, k_aux=0), d_model=2304, batch=4096, steps=1)
    slow = machine(read=1e6)
    found = plan(small, slow)
    assert found.bound_by == "reading"
    assert found.step_s == reading_s(small, slow) == 4096 * 2304 * 2 / 1e6


def test_more_machines_than_one_exchange_over_the_network():
    within, beyond = (sum(p.seconds for p in phases(BIG.on_mesh(data=1, feature=f), machine()) if "exchange" in p.name)
                      for f in (8, 16))  # fmt: skip
    assert beyond > 5 * within


def test_the_splits_of_a_number_of_ranks_are_the_factors_that_fit_fastest_first():
    found = splits(BIG.on_mesh(data=1, feature=64)._replace(lanes=64), machine())
    assert {(mesh.data, mesh.feature) for mesh in found} == {(1, 64)}  # half as many latents a rank would not fit
    found = splits(Workload(sae=TopK(n_latents=65_536, k=32, k_aux=0), d_model=768, batch=4096, feature=8), machine())
    assert {(mesh.data, mesh.feature) for mesh in found} == {(1, 8), (2, 4), (4, 2), (8, 1)}
    assert [mesh.tokens_per_second for mesh in found] == sorted((m.tokens_per_second for m in found), reverse=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sae": TopK(n_latents=10, k=4), "feature": 6}, "leave the last rank without a latent; use mesh.feature=5"),
        ({"batch": 2, "data": 4}, "use mesh.data<=2"),
        ({"data": 16, "lanes": 8}, "set order.lanes=16 or more"),
    ],
)
def test_a_mesh_that_leaves_a_rank_without_work_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        check(Workload(**({"sae": TopK(n_latents=64, k=4, k_aux=0), "d_model": 8, "batch": 64} | changed)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["target=34M", "mesh.feature=8"], "the smallest mesh that fits is mesh.data=1 mesh.feature="),
        (["target=34"], "target=34 is not known; choose one of"),
        (["machine=abacus"], "machine=abacus is not known; choose one of"),
        (["d_model=64", "sae.n_latents=4", "sae.k=8"], "k=8 exceeds n_latents=4"),
        (["d_model=64", "machine.memory=1e9"], "however it is split"),
        (["d_model=64", "machine.rates.product=-1"], "machine.rates.product"),
        (["train.batchh=3"], "unknown key train.batchh"),
    ],
)
def test_an_impossible_plan_is_one_line_with_the_cure(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]


def test_the_default_run_is_planned_from_its_models_configuration(capsys):
    """A layer of tiny-llama: q, o 32 x 32, k, v 32 x 16, three 32 x 96, two norms of 32: 12,352 weights."""
    assert main(["plan", "model=tiny-llama", "hook=resid_post.1", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["d_model"] == 32
    rows = found["cost"]["store_rows"]
    assert found["cost"]["harvest_flop"] == pytest.approx(2 * 2 * 12_352 * rows / (1 - 1 / 128))


@pytest.mark.parametrize(
    ("config", "hook", "width", "passed"),
    [
        (LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=40), "mlp_act.0", 40, 6_976),
        (MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=3), "resid_post.0", 32, 9_952),
        (BertConfig(**SIZES, intermediate_size=40), "resid_pre.2", 32, 2 * 6_984),
    ],
)
def test_a_model_in_a_folder_is_planned_from_its_configuration_alone(tmp_path, capsys, config, hook, width, passed):
    """A layer's weights by hand. Llama: 2 x 32 x 32, 2 x 32 x 16, 3 x 32 x 40, two norms. BERT: 4 x 32 x 33, 33 x 40,
    41 x 32, two norms. Mamba, whose inside is 64 wide: 32 x 128, 5 x 64, 64 x 34, 3 x 64, 64 x 16, 64, 64 x 32, a norm.
    """
    config.to_json_file(tmp_path / "config.json")
    assert main(["plan", f"model={tmp_path}", f"hook={hook}", "sae.k=4", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["d_model"] == width
    flop = 2 * passed * found["cost"]["store_rows"] / (1 - 1 / 128)
    assert found["cost"]["harvest_flop"] == pytest.approx(flop)


def test_people_get_tables(capsys):
    assert main(["plan", "target=1M"]) == 0
    shown = capsys.readouterr().out
    for words in ("memory of a rank", "time of a step", "tokens/s", "bound by", "smallest mesh that fits", "TB"):
        assert words in shown


def test_dictionaries_of_one_pass_add_up_but_are_read_for_once():
    wide = Workload(sae=TopK(n_latents=65_536, k=32, k_aux=0), d_model=768, batch=4096, feature=2)
    both = wide._replace(others=(wide._replace(sae=TopK(n_latents=16_384, k=64, k_aux=0)),))
    sole = both.others[0]
    for kind in ("h100", "a100"):
        one, other, together = (plan(work, machine(kind)) for work in (wide, sole, both))
        parts = [{part.name: part.bytes for part in found.memory} for found in (one, other, together)]
        for name in ("parameters, fp32", "Adam's moments, fp32", "checkpoint: copy while written"):
            assert parts[2][name] == parts[0][name] + parts[1][name]
        for name in ("program and libraries", "loader: windows, batches ahead"):
            assert parts[2][name] == parts[0][name]
        rows = "batch: rows, errors, pairs"
        assert parts[2][rows] == parts[0][rows] + parts[1][rows] - (2 + 4) * 4096 * 768
        assert together.reading_s == one.reading_s
        fed = sum(p.seconds for p in one.phases if p.name.startswith(("exchange: batch", "exchange: roll_call")))
        assert together.step_s == pytest.approx(one.step_s + other.step_s - fed)
    assert both.on_mesh(data=1, feature=1).others[0].feature == 1


def test_members_are_planned_and_those_that_fit_nowhere_refused(capsys):
    keys = ["plan", "d_model=768", "sae.n_latents=16384", "store=null"]
    assert main([*keys, "more_dictionaries=[{n_latents: 65536}, {k: 64}]", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [own["sae"]["n_latents"] for own in found["work"]["others"]] == [65_536, 16_384]
    assert main([*keys, "more_dictionaries=[{n_latents: 65536}]"]) == 0
    assert "65,536 latents x 768, k 32" in capsys.readouterr().out
    assert main([*keys, "more_dictionaries=[{n_latents: 10, k: 4}]", "machine.memory=1e9"]) == 2
    assert "and the 1 of more_dictionaries" in capsys.readouterr().err


def test_a_plan_takes_the_alternatives_of_a_run_by_name():
    found = compose("plan", ["sae=jumprelu", "model=tiny-llama", "text=builtin"])
    assert (found["sae"]["kind"], found["model"]["name"]) == ("jumprelu", "tiny-llama")
