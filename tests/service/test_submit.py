"""What is sent to a scheduler, without one: checked before, the same for the same run, and nothing secret in it."""

import dataclasses
import gzip
import http.server
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sae_dist.cli import submit as submit_command
from sae_dist.cli.compose import compose
from sae_dist.cli.main import COMMANDS, main
from sae_dist.config import UserError
from sae_dist.service.run_folder import claim
from sae_dist.service.signals import STOP_SIGNALS
from sae_dist.service.submit import attempts, ray_jobs, slurm_step
from sae_dist.service.submit.attempts import Attempts
from sae_dist.service.submit.job import environment
from sae_dist.service.submit.templates import LAUNCH_DIR
from tests.service.submissions import TRAIN, refused, shown, shown_json, stand_in

RAY = ("scheduler=ray", "address=http://127.0.0.1:1")
KUBERAY = ("train", "store=s3://bucket/mine", "out=/shared/runs/mine", "scheduler=kuberay", "image=registry/sae:1")
SKYPILOT = (
    "train", "store=s3://bucket/mine", "train.checkpoints=s3://bucket/checkpoints", "out=/shared/runs/mine",
    "scheduler=skypilot", "bucket=s3://bucket", "setup=pip install wheel",
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def same_handlers() -> Iterator[None]:
    """The handlers of signals that ask to stop are those of before again."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_local_command_goes_to_ray_with_absolute_places_and_a_name_that_follows_from_it(here, capsys):
    sent = shown_json(capsys, *TRAIN, *RAY)
    words = shlex.split(sent["entrypoint"])
    assert words[:4] == ["exec", "python", "-m", "sae_dist.service.submit.attempts"]
    command = words[words.index("train") :]
    assert {f"out={here}/runs/mine", f"store={here}/mine", "sae.k=4", "cluster=auto"} <= set(command)
    assert sent["metadata"]["sae_dist.out"] == f"{here}/runs/mine"
    assert re.fullmatch(r"train-mine-[0-9a-f]{8}", sent["submission_id"])
    again = shown_json(capsys, "train", *TRAIN[:0:-1], *RAY, "python=python3.12", "tries=3")
    assert again["submission_id"] == sent["submission_id"]  # neither the order of keys nor how it is run counts
    other = shown_json(capsys, *TRAIN, "seed=1", *RAY)
    assert other["submission_id"] != sent["submission_id"]
    (here / "corpus.txt").write_text("A text.\n")
    run = shown_json(capsys, "run", "preset=tiny", "text=corpus.txt", *RAY)["entrypoint"]
    assert f" text={here}/corpus.txt " in run and f" out={here}/runs/" in run  # where it would have been here


def test_a_mirror_and_event_files_are_where_they_would_have_been_here(here, capsys):
    for given, sent in (
        (("mirror=copies/mine", "tensorboard=events"), (f"mirror={here}/copies/mine", f"tensorboard={here}/events")),
        (("mirror=s3://bucket/mine", "tensorboard=true"), ("mirror=s3://bucket/mine", "tensorboard=true")),
    ):
        command = shlex.split(shown_json(capsys, *TRAIN, *given, *RAY)["entrypoint"])
        assert sorted(word for word in command if word.startswith(("mirror=", "tensorboard="))) == list(sent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the command first, one of run, harvest, train"),
        (["plan", *RAY], "name the command first"),
        ([*TRAIN], "scheduler is missing; set scheduler= to one of"),
        ([*TRAIN, "scheduler=pbs"], "scheduler=pbs is not known"),
        ([*TRAIN, "scheduler=ray"], "address is missing; set address=..."),
        ([*TRAIN, "scheduler=ray", "address=127.0.0.1:6379"], "is not that of a dashboard"),
        ([*TRAIN, "scheduler=ray", "address=http://me:secret@head:8265"], "is not that of a dashboard"),
        ([*TRAIN, "scheduler=ray", "address=http://head:82650"], "is not that of a dashboard"),
        ([*TRAIN, "scheduler=ray", "address=http://head:82b5"], "is not that of a dashboard"),
        ([*TRAIN, *RAY, "tries=0"], "tries=0: give 1 or more"),
        (["run", "text=mixture", "text.sources=[{kind: jsonl, path: a.jsonl}]", *RAY], "path: a.jsonl is relative"),
        (
            [*TRAIN, "more_dictionaries=[{k: 8, start_from: runs/a}]", *RAY],
            "more_dictionaries: start_from: runs/a is relative, and a job has another folder; write it whole",
        ),
        ([*TRAIN, *RAY, "partition=gpu"], "partition= is a key of scheduler=slurm, not of scheduler=ray"),
        ([*TRAIN, *RAY, "adress=x"], "those of scheduler=ray are address, follow"),
        ([*TRAIN, *RAY, "train.batch=none"], "train.batch='none': give a whole number"),
        ([*TRAIN, *RAY, "cluster=auto"], "cluster= is set by the scheduler; leave it out"),
        ([*TRAIN, *RAY, "store=s3://key:word@host/mine"], "store= holds a user or password"),
        ([*TRAIN, *RAY, "env=[WANDB_API_KEY]"], "env=WANDB_API_KEY looks like a secret"),
        ([*TRAIN, *RAY], "address=http://127.0.0.1:1: no Ray dashboard answers there"),
        ([*TRAIN, "scheduler=slurm", "array=4"], "array=4: only jobs of one sweep"),
        (["evaluate", "runs/mine", "scheduler=slurm", "nodes=2"], "nodes=2: evaluate works on one node"),
        ([*TRAIN, "scheduler=kuberay", "image=x"], "is not on the volume that the nodes see at mount=/shared"),
        ([*SKYPILOT, "store=/shared/mine"], "store=/shared/mine: the bucket at mount=/shared has no hard links"),
        ([*SKYPILOT, "train.checkpoints=null"], "set train.checkpoints=s3://BUCKET/FOLDER"),
        (["run", "preset=tiny", *SKYPILOT[2:]], "store=null: the bucket at mount=/shared has no hard links"),
        (["harvest", "model=tiny-llama", "store=/shared/a", *SKYPILOT[3:]], "store=/shared/a: the bucket at mount="),
        (["sweep", *SKYPILOT, "sae.k=4,8"], "scheduler=skypilot runs no sweep: its ledger lies in out="),
        (["run", "preset=tiny", "scheduler=torchrun"], "scheduler=torchrun runs train alone, not run"),
        ([*TRAIN, "mesh.data=3", "scheduler=torchrun", "nodes=2"], "are 3 processes, which are not shared evenly"),
        ([*TRAIN, "mesh.data=2", "scheduler=torchrun", "nodes=2"], "nodes=2 need to meet: set address=HOST:PORT"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_sent(words, message, capsys):
    assert message in refused(capsys, *words)


@pytest.mark.parametrize(("scheduler", "command"), [("slurm", "squeue"), ("kuberay", "kubectl"), ("skypilot", "sky")])
def test_a_machine_without_the_scheduler_says_so_and_what_to_do(scheduler, command, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    words = {"slurm": [*TRAIN, "scheduler=slurm"], "kuberay": KUBERAY, "skypilot": SKYPILOT}[scheduler]
    said = refused(capsys, *words)
    assert f"there is no {command} on this machine" in said and "dry_run=true" in said


def test_keys_of_schedulers_are_keys_of_no_command():
    """They are told apart by name."""
    own = {field.name for kind in submit_command.KINDS.values() for field in dataclasses.fields(kind)} - {"kind"}
    needed = {"harvest": ["store=x"], "train": ["store=x"], "evaluate": ["out=x"], "pages": ["out=x"]}
    for command in submit_command.COMMANDS:
        assert not (own | {"scheduler", "dry_run"}) & set(compose(command, needed.get(command, [])))
    assert set(submit_command.COMMANDS) <= set(COMMANDS)


def test_no_variable_with_a_secret_goes_along(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    assert environment(["AWS_ENDPOINT_URL"]) == {"AWS_ENDPOINT_URL": "http://store:9000"}
    with pytest.raises(UserError, match="env=NOT_SET_ANYWHERE is not set here"):
        environment(["NOT_SET_ANYWHERE"])


@pytest.mark.parametrize(
    "word",
    ["alerts.webhook=https://hooks.example.com/s3cr3t", "++alerts.webhook='https://hooks.example.com/s3cr3t'",
     "alerts={webhook: https://hooks.example.com/s3cr3t}", "alerts={webhook: https://hooks.example.com/?id=s3cr3t}"],
)  # fmt: skip
@pytest.mark.parametrize("command", [TRAIN, ("sweep", *TRAIN)])
def test_the_webhooks_address_does_not_become_a_part_of_the_command(command, word, capsys):
    said = refused(capsys, *command, *RAY, word, "dry_run=true")
    assert "alerts.webhook= is a secret that others could read in the command; leave it out and set SAE_DIST_" in said
    assert "s3cr3t" not in said


def test_the_webhooks_address_in_the_environment_changes_nothing_that_is_sent(capsys, monkeypatch):
    words = (*TRAIN, *RAY, "alerts.dead=0.25")
    without = shown(capsys, *words)
    monkeypatch.setenv("SAE_DIST_WEBHOOK", "https://hooks.example.com/s3cr3t")
    assert shown(capsys, *words) == without and "s3cr3t" not in without


def test_a_job_that_is_refused_is_not_tried_again(here, caplog):
    caplog.set_level("INFO")
    assert Attempts(["status", f"out={here}/nothing"], out=str(here), tries=5).run() == 2
    assert [line for line in caplog.messages if ", try " in line][0].endswith("try 1 of 5")
    assert not any("try 2" in line for line in caplog.messages)


def test_what_ended_early_or_died_is_tried_again_after_a_pause_and_failed_points_are_final(here, caplog, monkeypatch):
    """Storage may be away (75), and Python's own code for an error (1) is not that of a sweep whose points failed."""
    caplog.set_level("INFO")
    monkeypatch.setattr(attempts, "PAUSE_S", 0.2)
    monkeypatch.setattr(attempts, "LOOK_S", 0.01)
    (here / "codes").write_text("75\n1\n3\n0\n")
    stand_in(here / "bin", "python", f'echo >> {here}/calls; exit "$(sed -n "$(wc -l < {here}/calls)p" {here}/codes)"')
    monkeypatch.setattr(sys, "executable", str(here / "bin" / "python"))
    assert Attempts(["sweep", "train"], out=str(here), tries=5).run() == 3
    assert len((here / "calls").read_text()) == 3
    assert [line.partition(";")[0] for line in caplog.messages].count("trying again") == 2


def test_every_request_to_stop_is_heard(tmp_path, same_handlers):
    """Slurm asks before the time limit, and again at it, when the job that has not saved yet must be queued again."""
    heard = list[float]()

    def ask() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    with claim(tmp_path):
        threading.Timer(0.2, ask).start()
        code = Attempts(["status"], out=str(tmp_path), tries=5).run(lambda: heard.append(time.monotonic()))
    assert (code, len(heard)) == (75, 2)


def step_of_slurm(here: Path, monkeypatch, *, facts: str, refusals: int) -> list[str]:
    """What scontrol is asked for when a job of Slurm is to stop; so often it answers each question with a refusal."""
    asked = here / "asked"
    stand_in(
        here / "bin",
        "scontrol",
        f'''echo "$1" >> {asked}
if [ "$(grep -c "^$1$" {asked})" -le {refusals} ]; then
  echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2
  exit 1
fi
[ "$1" = requeue ] || echo "JobId=7 Restarts=0 Requeue=1 {facts}"''',
    )
    monkeypatch.setenv("PATH", f"{here}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm_step, "PAUSE_S", 0.01)
    monkeypatch.setattr(sys, "argv", ["slurm_step", "--tries=3", f"--out={here}", "status"])
    with claim(here):  # so that the step waits, as it does for a run
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert slurm_step.main() == 75
    return asked.read_text().split()


@pytest.mark.parametrize(
    ("facts", "requeued"),
    [
        ("JobState=RUNNING Reason=None", 3),  # two of them refused
        ("JobState=COMPLETING Reason=TimeLimit", 3),
        ("JobState=COMPLETING Reason=None", 0),  # cancelled
    ],
)
def test_a_slurm_that_is_busy_is_asked_again_after_the_run_has_saved(here, monkeypatch, same_handlers, facts, requeued):
    asked = step_of_slurm(here, monkeypatch, facts=facts, refusals=2)
    assert asked[:3] == ["show"] * 3 and asked.count("requeue") == requeued


def test_a_slurm_that_never_answers_is_given_up(here, monkeypatch, same_handlers, caplog):
    monkeypatch.setattr(slurm_step, "ASK_S", 0.1)
    asked = step_of_slurm(here, monkeypatch, facts="", refusals=1000)
    assert set(asked) == {"show"} and "submit it again" in caplog.messages[-1]


def test_a_cluster_that_has_just_begun_is_asked_again(here, capsys, monkeypatch):
    """Its dashboard answers before its head can take a job."""
    monkeypatch.setattr(ray_jobs, "LOOK_S", 0.01)
    refusals = ["No available agent to submit job, please try again later."]

    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"ray_version": "2.60.0"} if self.path == "/api/version" else [])

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(500, refusals.pop()) if refusals else self.answer(
                200, {key: sent["submission_id"] for key in ("job_id", "submission_id")}
            )

        def answer(self, code: int, content: object) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{serving.server_port}"
        assert main(["submit", *TRAIN, "scheduler=ray", f"address={address}"]) == 0
        assert f"to {address}" in capsys.readouterr().out and not refusals
        refusals += ["No available agent to submit job, please try again later."]
        monkeypatch.setattr(ray_jobs, "BEGIN_S", 0.0)
        assert main(["submit", *TRAIN, "scheduler=ray", f"address={address}"]) == 2
        assert "start the head with --dashboard-agent-listen-port=" in capsys.readouterr().err
        serving.shutdown()


def fields(schema: dict[str, Any], values: object, path: str = "") -> Iterator[str]:
    """What `values` has and the schema does not know; the schema itself lets it pass."""
    if isinstance(values, dict) and "properties" in schema:
        for key, value in values.items():
            if key not in schema["properties"]:
                yield f"{path}.{key}"
            else:
                yield from fields(schema["properties"][key], value, f"{path}.{key}")
    elif isinstance(values, list):
        for value in values:
            yield from fields(schema.get("items", {}), value, path)


def test_a_rayjob_has_the_shape_that_its_definition_asks_for(capsys):
    schema = json.loads(gzip.decompress((Path(__file__).parent / "data/rayjob-v1.schema.json.gz").read_bytes()))
    job = yaml.safe_load(shown(capsys, *KUBERAY, "nodes=3", "gpus=8", "namespace=team", "tls=true", "tries=4"))
    definition = jsonschema.Draft202012Validator(schema)
    definition.validate(job)
    assert not [name for name in fields(schema, job) if not name.startswith(".metadata")]
    assert job["metadata"]["namespace"] == "team"
    spec = job["spec"]
    assert spec["backoffLimit"] == 3 and "cluster=auto" in spec["entrypoint"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["tlsOptions"] == {"enabled": True}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == 3
    groups = [cluster["headGroupSpec"], workers]
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups]
    assert gpus == [None, "8"]
    for group in groups:
        pod = group["template"]["spec"]
        assert [container["image"] for container in pod["containers"]] == ["registry/sae:1"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    spec["backoffLimit"], cluster["authOption"] = "many", {}  # the check can fail
    with pytest.raises(jsonschema.ValidationError):
        definition.validate(job)
    assert ".spec.rayClusterSpec.authOption" in fields(schema, job)


def test_kubectl_applies_what_is_new_and_leaves_what_runs_or_is_done(here, capsys, monkeypatch):
    stand_in(
        here / "bin",
        "kubectl",
        f'echo "$@" >> {here}/told; [ "$1" = get ] && exec cat {here}/found; cat > {here}/given',
    )
    monkeypatch.setenv("PATH", f"{here}/bin:{os.environ['PATH']}")
    then = {"": ["get", "apply"], "RUNNING": ["get"], "SUCCEEDED": ["get"], "FAILED": ["get", "delete", "apply"]}
    for state, verbs in then.items():
        (here / "found").write_text(json.dumps({"status": {"jobStatus": state}}) if state else "")
        (here / "told").unlink(missing_ok=True)
        assert main(["submit", *KUBERAY]) == 0
        told = (here / "told").read_text().splitlines()
        assert [line.split()[0] for line in told] == verbs
    assert yaml.safe_load((here / "given").read_text())["kind"] == "RayJob"


def test_skypilot_gets_its_file_and_takes_secrets_from_the_environment(here, capsys, monkeypatch):
    noting = f'echo "$@" > {here}/told; printenv RAY_AUTH_TOKEN > {here}/token; cp "${{@: -1}}" {here}/given'
    stand_in(here / "bin", "sky", noting)
    monkeypatch.setenv("PATH", f"{here}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", "not for everybody")
    assert main(["submit", *SKYPILOT, "nodes=2", "secrets=[WANDB_API_KEY]"]) == 0
    told, given = (here / "told").read_text(), (here / "given").read_text()
    assert "jobs launch --yes" in told and "--secret WANDB_API_KEY --secret RAY_AUTH_TOKEN" in told
    token = (here / "token").read_text().strip()
    assert len(token) == 64
    assert all(secret not in told + given for secret in (token, "not for everybody"))
    task = yaml.safe_load(given)
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 9, "recover_on_exit_codes": [75]}
    assert task["num_nodes"] == 2 and "cluster=auto" in task["run"]
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


def test_a_slurm_script_is_valid_shell_with_what_was_asked_for(here, capsys):
    words = ("nodes=4", "gpus=8", "partition=big", "time_limit=02:00:00", "save_s=120", "sbatch=--constraint=h100")
    script = shown(capsys, *TRAIN, "scheduler=slurm", *words, "setup=module load cuda")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    wanted = [
        "--nodes=4", "--gpus-per-node=8", "--partition=big", "--time=02:00:00", "--signal=B:TERM@120", "--requeue",
        "--open-mode=append", "--constraint=h100", "--exclusive", f"--output={here}/runs/mine/slurm-%j.log",
    ]  # fmt: skip
    assert set(wanted) <= set(options)
    assert "\nmodule load cuda\n" in script and not re.search("@[A-Z]+@", script)


def test_a_sweep_is_an_array_of_jobs_that_share_its_points(here, capsys):
    words = ("sweep", "train", "store=mine", "out=sweeps/mine", "sae.k=4,8", "sae.n_latents=64", "scheduler=slurm")
    script = shown(capsys, *words, "array=3")
    assert "\n#SBATCH --array=1-3\n" in script and f"{here}/sweeps/mine/slurm-%A_%a.log" in script
    assert f" sweep train sae.k=4,8 sae.n_latents=64 out={here}/sweeps/mine store={here}/mine)" in script
    assert "sae.k=-1: give 1 or more" in refused(capsys, *words, "sae.k=4,-1")
    assert "store= takes several values here" in refused(capsys, *words, "store=a,b")


def test_torchrun_has_a_line_for_every_node(capsys):
    alone = shown(capsys, *TRAIN, "mesh.feature=2", "scheduler=torchrun")
    assert "--standalone --nproc-per-node=2 -m sae_dist train " in alone and "cluster=" not in alone
    several = shown(capsys, *TRAIN, "mesh.feature=4", "scheduler=torchrun", "nodes=2", "address=head:29500")
    assert (
        "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=head:29500 --rdzv-id=train-" in several
        and "--nproc-per-node=2" in several
    )


def test_jobs_are_where_a_scheduler_is(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["jobs"]) == 2
    assert "set address= to a Ray cluster's dashboard" in capsys.readouterr().err
    assert main(["jobs", "address=http://127.0.0.1:1", "stop=a"]) == 2
    assert "no Ray dashboard answers there" in capsys.readouterr().err
    assert main(["jobs", "address=http://127.0.0.1:82650"]) == 2
    assert "address=http://127.0.0.1:82650 is not that of a dashboard: http://HEAD:8265" in capsys.readouterr().err


def test_the_templates_travel_with_the_package():
    built = tomllib.loads((LAUNCH_DIR.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert built["targets"]["wheel"]["force-include"][LAUNCH_DIR.name] == "sae_dist/launch"
