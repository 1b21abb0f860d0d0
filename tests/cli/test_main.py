"""The command line: what it composes, what it refuses and how it says so."""

import functools
import subprocess
import sys

import pytest
import yaml

from sae_dist.cli.compose import compose, options, spelled_out
from sae_dist.cli.main import COMMANDS, main
from sae_dist.config import CONF_DIR, UserError, load, to_dict
from sae_dist.service.config import HarvestJob, RunConfig, TrainJob, config_hash
from sae_dist.storage import s3
from tests.shards.seaweedfs import KEYS

JOBS = {"run": RunConfig, "harvest": HarvestJob, "train": TrainJob}
NEEDED = {"harvest": ["store=s"], "train": ["store=s"]}


def groups():
    """Every YAML of every group, as an override of every command that has the group."""
    for command in JOBS:
        bare = yaml.safe_load((CONF_DIR / f"{command}.yaml").read_text())
        for group in (next(iter(entry)) for entry in bare["defaults"] if isinstance(entry, dict)):
            yield from ((command, f"{group}={name}") for name in options(group, JOBS[command]))
    yield from (("run", f"preset={path.stem}") for path in sorted((CONF_DIR / "preset").glob("*.yaml")))


@pytest.mark.parametrize(("command", "override"), list(groups()))
def test_every_yaml_composes_and_loads(command, override):
    needed = [*NEEDED.get(command, []), *(["model.name=gpt2"] if override == "model=hf" else [])]
    config = load(JOBS[command], compose(command, [override, *needed]))
    assert load(JOBS[command], to_dict(config)) == config


@pytest.mark.parametrize("preset", [(), ("preset=tiny",)])
def test_pages_null_is_no_pages_also_where_a_preset_has_keys_of_it(preset):
    assert load(RunConfig, compose("run", [*preset, "pages=null"])).pages is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sae.kk=3", "store=s"], "unknown key sae.kk; did you mean sae.k?"),
        (["run", "sae.k=three"], "sae.k='three': give a whole number"),
        (["run", "sae=null"], "sae is missing; set sae="),
        (["run", "sae=topkk"], "sae=topkk is not known; choose one of abs_topk, batchtopk, gated,"),
        (["run", "sae=batchtopk", "sae.k=three"], "sae.k='three': give a whole number"),
        (["run", "sae.kind=other"], "sae.kind='other': choose one of 'topk'"),
        (["run", "train.lr=inf"], "train.lr=inf: give a finite number"),
        (["run", "more_dictionaries=[8]"], "more_dictionaries.0=8: give keys and values"),
        (["run", "harvest.replicas=[1]"], "harvest.replicas=[1]: give a whole number or give text"),
        (["run", "wandb.mode=sometimes"], "wandb.mode='sometimes': give 'offline', 'online' or 'disabled'"),
        (["run", "seed=null"], "seed=null: give a whole number"),
        (["run", "sae.n_latents=16", "sae.k=32"], "k=32 exceeds n_latents=16"),
        (["run", "train.batch=0"], "train.batch=0: give 1 or more"),
        (["run", "harvest.rows.drop_first=128"], "drops all of harvest.context=128"),
        (
            ["run", "train.start_from={tmp}/no", "out={tmp}/a"],
            "train.start_from={tmp}/no: no dictionary is there; give a",
        ),
        (["run", "text=/nowhere/at/all.txt", "out={tmp}/a", "model=tiny-llama"], "/nowhere/at/all.txt"),
        (["run", "hook=resid_post.99", "out={tmp}/b", "model=tiny-llama"], "hook='resid_post.99'"),
        (["run", "model=/nowhere/model", "out={tmp}/c"], "model.name=/nowhere/model"),
        (["train", "store={tmp}/nothing", "out={tmp}/d"], "{tmp}/nothing"),
        (["train"], "store is missing; set store="),
        (["run", "model=hf"], "model.name is missing; set model.name="),
        (["status", "{tmp}/e"], "holds no run"),
        (
            ["train", "store={tmp}/s", "mesh.feature=2", "train.launcher=process", "out={tmp}/f"],
            "mesh.data=1 x mesh.feature=2 are 2 processes; use auto or actors",
        ),
        (["train", "store={tmp}/s", "train.launcher=torchrun"], "use `torchrun --standalone --nproc-per-node 1 "),
        (["run", "train.launcher=process", "out={tmp}/f", "model=tiny-llama"], "this command trains in Ray actors"),
        (
            ["train", "store={tmp}/s", "mesh.data=2", "mesh.least_data=1", "out={tmp}/f"],
            "mesh.least_data=1 with train.launcher=auto: only ray_train continues with fewer ranks than mesh.data",
        ),
        (["train", "store={tmp}/s", "mesh.least_data=2", "out={tmp}/f"], "mesh.least_data=2 exceeds mesh.data=1"),
        (["run", "mesh.data=2", "mesh.least_data=1", "out={tmp}/f", "model=tiny-llama"], "this command trains in Ray"),
        (
            ["run", "cluster=ray://head:10001", "out={tmp}/f", "model=tiny-llama"],
            "cluster=ray://head:10001 cannot be joined (ray://head:10001 is not the HOST:PORT of a head, e.g. 10.0.0.1",
        ),
        (["run", "cluster=head:x", "out={tmp}/f", "model=tiny-llama"], "cluster=head:x cannot be joined (Malformed"),
        (
            ["harvest", "cluster=127.0.0.1:1024", "out={tmp}/f", "store={tmp}/s", "model=tiny-llama"],
            "cluster=127.0.0.1:1024 cannot be joined (no Ray answers at 127.0.0.1:1024 within 5 s)",
        ),
        (["run", "harvest.replicas=4..2"], "harvest.replicas=4..2; give a number from 1 on, or two: 1..4"),
        (["run", "harvest.ahead_units=31"], "give 32 or more"),
        (["run", "harvest.retention=ring"], "lower train.tokens to 9425781"),
        (["run", "harvest.replicas=0"], "harvest.replicas=0; give a number from 1 on, or two: 1..4"),
        (["frobnicate"], "unknown command frobnicate; choose one of run"),
        (["run", "nonsense"], "nonsense is not understood; write key=value"),
        (["run", "train.lr=[1"], "train.lr=[1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main([argument.format(tmp=tmp_path) for argument in arguments])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(said) == 1
    assert message.format(tmp=tmp_path) in said[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["store", "ls", "store=s3://bucket/acts"],
        ["train", "store=s3://bucket/acts", "out={tmp}/run"],
        ["sweep", "train", "store=s3://bucket/acts", "sae.k=2,4", "out={tmp}/sweep"],
    ],
)
def test_storage_that_does_not_answer_is_one_line_and_exit_code_75(arguments, tmp_path, capsys, monkeypatch):
    """A scheduler repeats such a command; one that is refused it does not."""
    monkeypatch.setattr(s3, "S3Config", functools.partial(s3.S3Config, retry_s=0.05, pause_s=0.01))
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    code = main([argument.format(tmp=tmp_path) for argument in arguments])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 75
    assert "store=s3://bucket/acts: " in said and said.endswith("is the endpoint up and reachable? run again to resume")


def test_a_name_or_a_path_will_do_for_model_and_text(tmp_path):
    def text(value):
        return compose("run", [f"text={value}"])["text"]

    assert compose("run", ["model=openai-community/gpt2"])["model"]["name"] == "openai-community/gpt2"
    assert compose("run", ["model=tiny-gpt2"])["model"]["name"] == "tiny-gpt2"
    assert (text("a/b.jsonl.gz")["kind"], text("x.parquet")["kind"]) == ("jsonl", "parquet")
    assert text(tmp_path) == text("files") | {"path": str(tmp_path)}
    assert text("owner/name") == text("huggingface") | {"path": "owner/name"}


@pytest.mark.parametrize(
    "name", ["/tmp/lr=1e-3", "résultats", "run (1)", "2024", "1e-3", "true", "a,b", "run's", "x#y & z", "[x", "日本",
             "'a' or 'b'", '"a," she said', "back\\slash", "a\\'b", "end\\"]
)  # fmt: skip
def test_a_place_is_a_name_whatever_signs_are_in_it(name):
    assert compose("train", ["store=s", "sae=topk", f"out={name}"])["out"] == name


@pytest.mark.parametrize("name", ["runs/o'brien", "'run'", '"run"', "a,b", "[x", "back\\slash", "2024"])
def test_a_place_without_its_key_is_a_name_too(name):
    assert compose("status", spelled_out("status", [name]))["out"] == name
    assert compose("steer", spelled_out("steer", [name]))["run"] == name


@pytest.mark.parametrize(("given", "read"), [("'a,b'", "a,b"), ('"a,b"', "a,b"), ("'it\\'s'", "it's"), ("''", "")])
def test_quotes_around_a_place_are_taken_off(given, read):
    assert compose("train", [f"store={given}", "out=o"])["store"] == read


@pytest.mark.parametrize("prompt", ['"Yes."', '"I am happy," she said', 'He said "no"', "it's", "{x}: $y = [z]"])
def test_quotes_are_a_part_of_a_prompt(prompt):
    assert compose("steer", ["run=r", f"prompt={prompt}"])["prompt"] == prompt


@pytest.mark.parametrize("around", ["'", '"'])
def test_quotes_around_a_model_and_a_text_are_taken_off(around):
    values = compose("run", [f"model={around}my gpt{around}", f"text={around}a b.md{around}"])
    assert (values["model"]["name"], values["text"]["kind"], values["text"]["path"]) == ("my gpt", "files", "a b.md")
    known = compose("run", [f"model={around}tiny-gpt2{around}"])["model"]
    assert known == compose("run", ["model=tiny-gpt2"])["model"]


def test_a_group_of_other_commands_is_a_plain_key_here():
    for model in ("gpt2", "meta-llama/Llama-3.1-8B", "smollm2"):
        assert compose("store", ["action=import", "store=s", f"model={model}"])["model"] == model
    with pytest.raises(UserError, match="unknown key sae"):
        compose("store", ["action=import", "store=s", "sae=topk"])


def test_what_may_differ_between_two_starts_is_not_part_of_the_hash():
    def hashed(*overrides):
        return config_hash(load(RunConfig, compose("run", list(overrides))), "a store")

    assert hashed() == hashed("out=x", "wandb.mode=disabled", "harvest.replicas=1..4", "train.log_every=1")
    assert hashed("train.tokens=1000000") == hashed(
        "train.tokens=1000000", "harvest.retention=until_consumed", "harvest.ahead_units=40"
    )
    assert (
        len({hashed(), hashed("seed=1"), hashed("sae.k=31"), hashed("train.batch=8"), hashed("hook=resid_post.3")}) == 5
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_and_its_keys(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: sae-dist {command}" in shown
    described = yaml.safe_load((CONF_DIR / f"{command}.yaml").read_text())
    defaults = [entry for entry in described.pop("defaults", []) if isinstance(entry, dict)]
    chosen = [name for entry in defaults for name, default in entry.items() if default is not None]
    for key in [*described, *chosen]:
        assert f"\n{key}:" in shown


def test_the_command_line_starts_without_loading_what_it_does_not_need():
    code = "import sys, sae_dist.cli.main as m; m.main(['--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "hydra", "wandb"} & set(loaded)


def test_a_config_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="unknown key sae.kk=1"):
        load(
            TrainJob,
            {"out": "o", "store": "s", "sae": {"kind": "topk", "kk": 1}, "order": {}, "train": {}, "wandb": {}},
        )
