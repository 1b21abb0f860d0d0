"""Jobs of Slurm: an sbatch script, Ray over the job's nodes where there are several, and the queue by Slurm's commands.

A job is known by its name, which is the run's. Its log lies in the run's folder.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from sae_dist.config import Stopped, UserError, frozen
from sae_dist.service.submit.job import Job, left_alone
from sae_dist.service.submit.templates import template

STEP = "sae_dist.service.submit.slurm_step"  # what runs the command in the job
MARK = "sae-dist"  # begins the comment of a job of ours
LOOK_S = 2.0
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "RESIZING", "SIGNALING")
FORGOTTEN = "FORGOTTEN"  # the state of a job that Slurm knows no more


@frozen
class Slurm:
    """A Slurm cluster, from a machine that has its commands. Folders must be the same on its nodes."""

    kind: Literal["slurm"] = "slurm"
    follow: bool = False  # show the job's log until it ends; Ctrl-C leaves the job in the queue
    nodes: Annotated[int, Field(ge=1)] = 1  # machines
    cpus: Annotated[int, Field(ge=1)] | None = None  # of a node; null: what the partition gives
    gpus: str | int | None = None  # of a node: 8, or a100:8
    memory: str | None = None  # of a node: 256G
    time_limit: str | int | None = "24:00:00"  # as sbatch takes it
    save_s: Annotated[int, Field(ge=1)] = 300  # seconds before the time limit at which the run saves, and queues again
    partition: str | None = None  # where to queue; null: the default
    account: str | None = None  # who pays; null: the default
    qos: str | None = None  # quality of service; null: the default
    array: Annotated[int, Field(ge=1)] = 1  # of a sweep: how many jobs share its points
    sbatch: str = ""  # more options: --constraint=h100
    setup: str = ""  # shell before the command: module load cuda
    tries: Annotated[int, Field(ge=1)] = 10  # how often the run is started in all, time limits and preemptions included
    python: str | None = None  # on the cluster's nodes; null: the one that runs this


class Queued(NamedTuple):
    """A job of ours in the queue."""

    number: str  # 12, or 12_3 of an array
    id: str
    state: str
    elapsed: str
    out: str


def render(job: Job, options: Slurm) -> str:
    """The script that sbatch gets."""
    if options.nodes > 1 and not job.joins_cluster:
        raise UserError(f"nodes={options.nodes}: {job.command} works on one node; use nodes=1")
    if options.array > 1 and job.command != "sweep":
        raise UserError(f"array={options.array}: only jobs of one sweep share their work; use array=1")
    filled = {
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in _options(job, options)),
        "PATH": f"{shlex.quote(os.path.dirname(options.python or sys.executable))}:$PATH",
        "SETUP": options.setup,
        "COMMAND": shlex.join(job.attempts("python", options.tries, by=STEP)),
    }
    text = template("slurm.sbatch")
    text = text.replace(text.splitlines()[1], f"# {job.id}: sae-dist {job.command}, by sae-dist submit.")
    return re.sub(r"@([A-Z]+)@", lambda found: filled[found[1]], text)


def _options(job: Job, options: Slurm) -> list[str]:
    given = {
        "cpus-per-task": options.cpus, "gpus-per-node": options.gpus, "mem": options.memory, "time": options.time_limit,
        "partition": options.partition, "account": options.account, "qos": options.qos,
        "array": f"1-{options.array}" if options.array > 1 else None,
        "signal": f"B:TERM@{options.save_s}" if options.time_limit else None,
    }  # fmt: skip
    log = str(_folder(job.out)).replace("%", "%%") + ("/slurm-%A_%a.log" if options.array > 1 else "/slurm-%j.log")
    return [
        f"--job-name={job.id}", f"--comment={shlex.quote(f'{MARK} {job.out}')}", f"--nodes={options.nodes}",
        "--ntasks-per-node=1", *(["--exclusive"] if options.nodes > 1 else []),
        *(f"--{name}={value}" for name, value in given.items() if value is not None), "--requeue", "--open-mode=append",
        f"--output={shlex.quote(log)}", *shlex.split(options.sbatch),
    ]  # fmt: skip


def submit(job: Job, options: Slurm) -> int:
    """Queues the job unless it is there or done; the exit code of this command."""
    script, there = render(job, options), queued()
    mine = [found for found in there if found.id == job.id]
    if mine:
        number = mine[0].number
        print(f"{job.id} is there already: job {number}, {mine[0].state.lower()}")
    elif job.is_done():
        print(f"{job.id} is done already; its results are in {job.out}")
        return 0
    else:
        for found in there:
            if found.out == job.out:
                raise UserError(
                    f"out={job.out} is being worked on by job {found.number} ({found.id}), which has another "
                    f"configuration; wait for it, stop it (sae-dist jobs stop={found.id}), or choose another out="
                )
        _folder(job.out).mkdir(parents=True, exist_ok=True)
        number = _slurm("sbatch", "--parsable", given=script).strip().partition(";")[0]
        print(f"submitted {job.id} as job {number}; its log: {_log(job.out, number)}")
    if options.follow and options.array == 1:
        return follow(number)
    print(f"follow it with: sae-dist jobs follow={number}{'_1' if options.array > 1 else ''}")
    return 0


def queued() -> list[Queued]:
    """The jobs of ours in the queue, the elements of arrays one by one."""
    lines = _slurm("squeue", "--me", "--noheader", "--array", "--format=%i|%j|%T|%M|%k").splitlines()
    fields = [Queued(*line.split("|", 4)) for line in lines]
    return [job._replace(out=job.out.removeprefix(f"{MARK} ")) for job in fields if job.out.startswith(f"{MARK} ")]


def stop(name: str) -> None:
    """Asks a job, by its number or its name, to save and end, and returns when it has; it stays out of the queue."""
    for found in _named(name):
        _slurm("scontrol", "update", f"JobId={found.number}", "Requeue=0")
        if found.state == "PENDING":
            _slurm("scancel", found.number)
        else:
            _slurm("scancel", "--signal=TERM", found.number)
            print(f"job {found.number} was asked to stop; it saves first")
        while (facts := facts_of(found.number))["JobState"] in ALIVE:
            time.sleep(LOOK_S)
        print(f"job {found.number}: {facts['JobState'].lower()}; submit it again to resume")


def follow(name: str) -> int:
    """Shows a job's log until it ends, over all its returns to the queue; the exit code that it stands for."""
    found, *more = _named(name)
    if more:
        raise UserError(f"follow={name} are several jobs; name one of them: {', '.join(one.number for one in more)}")
    try:
        return _follow(found)
    except (KeyboardInterrupt, Stopped):
        return left_alone(found.number)


def _follow(found: Queued) -> int:
    log, at = _log(found.out, found.number), 0
    while True:
        facts = facts_of(found.number)  # before the log is read: then nothing comes after it
        if log.exists():
            with log.open("rb") as file:
                file.seek(at)
                sys.stdout.write(file.read().decode(errors="replace"))
                sys.stdout.flush()
                at = file.tell()
        if facts["JobState"] not in ALIVE:
            print(f"job {found.number}: {facts['JobState'].lower()}")
            return _exit_code(facts)
        time.sleep(LOOK_S)


def facts_of(number: str) -> dict[str, str]:
    """What Slurm knows of a job; its state is FORGOTTEN some minutes after it ended."""
    try:
        said = _slurm("scontrol", "show", "job", "--oneliner", number)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return {"JobState": FORGOTTEN}
    return dict(re.findall(r"(\w+)=(\S*)", said))


def _exit_code(facts: dict[str, str]) -> int:
    """That of the command; 75 where Slurm ended the job before it did."""
    match facts["JobState"]:
        case "COMPLETED":
            return 0
        case "FAILED":
            return int(facts["ExitCode"].partition(":")[0]) or 1
        case _:
            return 75


def _named(name: str) -> list[Queued]:
    found = [each for each in queued() if name in (each.number, each.id, each.number.partition("_")[0])]
    if not found:
        raise UserError(f"the queue has no job {name} of sae-dist; `sae-dist jobs` lists them")
    return found


def _log(out: str, number: str) -> Path:
    return _folder(out) / f"slurm-{number}.log"


def _slurm(*command: str, given: str | None = None) -> str:
    """What a command of Slurm says; UserError where there is none, or where it refuses."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"there is no {command[0]} on this machine; submit from a login node of the cluster, or use dry_run=true "
            "and give the script to sbatch there"
        )
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def _folder(out: str) -> Path:
    """Where the log goes: the run's folder, if it is one."""
    return Path.cwd() if "://" in out else Path(out)
