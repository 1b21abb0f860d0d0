"""The launch files, as far as a machine without a cluster can tell."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.service.submissions import TRAIN, run_script, shown, stand_in

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_slurm_script_ends_as_the_run_does_behind_a_token_of_its_own(code, tmp_path, capsys, monkeypatch):
    """Run for real between stand-ins of Slurm's commands."""
    monkeypatch.chdir(tmp_path)
    script = shown(capsys, *TRAIN, "scheduler=slurm", "nodes=2")
    tell = f'printenv RAY_AUTH_MODE RAY_AUTH_TOKEN >> {tmp_path}/token; printf "%s " "$@" > {tmp_path}/told'
    stand_in(tmp_path / "bin", "srun", f"{tell}; exit {code}")
    stand_in(tmp_path / "bin", "scontrol", '[ "$2" = node ] && echo "NodeName=a NodeAddr=localhost" || echo a')
    variables = {"SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "7"}
    for _ in range(2):
        assert run_script(script, tmp_path / "bin", variables).returncode == code
    tokens, told = (tmp_path / "token").read_text().splitlines(), (tmp_path / "told").read_text()
    assert tokens[::2] == ["token"] * 2 and all(len(token) == 64 for token in tokens[1::2])
    assert len(set(tokens[1::2])) == 2 and not any(token in told for token in tokens[1::2])
    assert "--address 127.0.0.1:20007 --min-nodes 2 --num-cpus 3" in told
    assert told.endswith("cluster=127.0.0.1:20007 ") and "out=" in told


def test_the_example_for_skypilot_is_one_that_submit_lets_pass(capsys):
    example = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    words = shlex.split(example["run"])
    (mount,) = example["file_mounts"]
    where = (f"bucket={example['file_mounts'][mount]['source']}", f"mount={mount}", f"setup={example['setup']}")
    made = yaml.safe_load(shown(capsys, *words[words.index("train") :], "scheduler=skypilot", *where))
    assert shlex.split(made["run"]) == words
    assert example == made | {"name": example["name"], "run": example["run"]}


def test_the_image_copies_what_the_package_is_built_from():
    copied = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "README.md", "sae_dist", "kernels", "conf", "launch"} <= names
    assert all((LAUNCH.parent / name).exists() for name in names)
