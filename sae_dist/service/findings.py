"""What a person should know of a run beyond its figures, each with the next thing to do.

Pure: all that is known is given.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sae_dist.config import UserError, load
from sae_dist.monitor.alerts import decide
from sae_dist.monitor.config import AlertsConfig
from sae_dist.service.display import duration
from sae_dist.service.run_status import RunStatus, rate
from sae_dist.service.summary import SUMMARY_CURE
from sae_dist.train.members import split_name

STARVED, BLOCKED, HELD = 0.2, 0.2, 0.5  # shares of the time that are worth a word
DEAD = 0.3  # of the latents
FULL, FULL_BYTES = 0.03, 2 << 30  # of the disk, and bytes that are free at least
STILL_S, STILL_LINES = 120.0, 10.0  # a training that wrote no line for so long, and so many times the usual, is stuck
STUCK_S = 900.0  # another phase that says the same for so long


class Checkpoint(NamedTuple):
    """The newest complete checkpoint; time in seconds since the epoch."""

    step: int
    time: float


class Disk(NamedTuple):
    """Of the run's folder, in bytes."""

    free: int
    total: int


class Finding(NamedTuple):
    """What is so, what to do about it, and the command that does it where it is known."""

    what: str
    do: str = ""
    command: str = ""


def findings(run: RunStatus, *, checkpoint: Checkpoint | None = None, disk: Disk | None = None) -> list[Finding]:
    """All that is worth a word, the gravest first: how it ended or what it hangs on, damage, then what slows it."""
    found = [*_ended(run, checkpoint), *damaged(run.damage)]
    found += [Finding(f"ALERT: {alert}") for alert in _alerts(run)]
    if run.works:
        found += [*_stuck(run), *_slow(run), *_replicas(run), *_alarms(run)]
        if disk is not None and disk.free < max(FULL * disk.total, FULL_BYTES):
            what = f"the disk is nearly full: {disk.free / 1e9:.1f} GB of {disk.total / 1e9:.0f} GB are free"
            found.append(Finding(what, "free space, or keep less: train.keep_checkpoints, harvest.retention"))
    return found + list(_learning(run))


def _ended(run: RunStatus, checkpoint: Checkpoint | None) -> Iterator[Finding]:
    """How it came to its end, and how it goes on."""
    note, again, command = str(run.said.get("note", "")), _again(run, checkpoint), run.command or ""
    match run.state:
        case "dead":
            yield Finding(f"no process works on it any more: it was killed while {run.phase}", again, command)
        case "silent":
            where = f"`sae-dist status {run.config['out']}`" if run.config.get("out") else "`sae-dist status`"
            yield Finding(
                f"nothing new for {duration(run.age_s or 0)} while {run.phase}: the run is dead or hangs, or its copy "
                "does not get here any more",
                f"ask {where} on {run.said.get('host', 'its machine')}; if it is dead, {again}",
                command,
            )
        case "stopped":
            yield Finding(f"stopped: {note.partition(';')[0]}", again, command)
        case "refused":
            yield Finding(f"refused: {note}", f"then {again}", command)
        case "failed":
            yield Finding(f"failed: {note}", f"{again}; report it if it fails so again", command)
        case "done" if run.summary is None and "step" in run.said and not run.damage:
            yield Finding(f"{run.place}/summary.json is missing", SUMMARY_CURE, command)


def _again(run: RunStatus, checkpoint: Checkpoint | None) -> str:
    """What the same command would do."""
    if checkpoint is not None:
        return f"the same command resumes at step {checkpoint.step:,}"
    anew = run.claimed is not None and run.training
    return f"the same command {'trains anew, for there is no checkpoint' if anew else 'resumes'}"


def damaged(lines: Iterable[str]) -> list[Finding]:
    """Of lines that name a file and, after the last semicolon, the cure."""
    parts = [line.rpartition("; ") for line in lines]
    return [Finding(what, cure) if what else Finding(cure) for what, _, cure in parts]


def _alerts(run: RunStatus) -> list[str]:
    """Of the final figures; while it works, those of the last lines."""
    if run.state == "done":
        return list((run.summary or run.said).get("alerts", []))
    said = [run.said.get("harvest", {}).get("alert")]
    said += [value for line in run.training for key, value in line.items() if split_name(key)[1] == "alert"]
    return [str(alert) for alert in said if alert][-4:]


def _stuck(run: RunStatus) -> Iterator[Finding]:
    """Nothing happens any more, as far as files can say."""
    who = f"process {run.said.get('pid', '?')} on {run.said.get('host', 'its machine')}"
    look = "see its log; if it hangs, stop it and repeat the command"
    if run.claimed and (run.age_s or 0.0) > 2 * STILL_S:
        yield Finding(f"nothing new in status.json for {duration(run.age_s or 0)}, though {who} holds the run", look)
        return
    since = run.now - run.said.get("changed", run.now)
    if "training" in run.phase and len(run.training) > 2:
        silent, usual = run.now - run.training[-1].get("time", run.now), _seconds_a_line(run)
        patience = STUCK_S if "harvesting" in run.phase else STILL_S  # rows may be long in coming
        if silent > max(patience, STILL_LINES * usual):
            yield Finding(f"no step for {duration(silent)}; a line came every {duration(usual)} before", look)
    elif since > STUCK_S:
        yield Finding(f"no progress for {duration(since)} in {run.phase} ({who})", look)


def _seconds_a_line(run: RunStatus) -> float:
    lines = [{"time": line["time"], "line": n} for n, line in enumerate(run.training) if "time" in line]
    return 1 / per_second if (per_second := rate(lines, "line")) else 0.0


def _slow(run: RunStatus) -> Iterator[Finding]:
    """Which side waits for the other now."""
    harvest = run.said.get("harvest", {})
    starved = rate(run.training, "starved_seconds") or 0.0
    if "training" in run.phase and starved > STARVED:
        what = f"training waits for rows {min(starved, 1):.0%} of its time"
        if "harvesting" in run.phase:
            yield Finding(
                f"{what}: the harvest is the slower side",
                f"more replicas ({harvest.get('replicas', '?')} now): raise harvest.replicas",
            )
        else:
            yield Finding(f"{what}: reading the store is the slower side", "train.cache=FOLDER, or a nearer store")
    held = rate(run.harvest, "held_s") or 0.0
    if "harvesting" in run.phase and held > HELD:
        yield Finding(
            f"the harvest is held {min(held, 1):.0%} of the time for {harvest.get('waits for') or 'its readers'}: "
            "training is the slower side",
            "nothing is lost; fewer replicas do, or more ranks train (mesh.data)",
        )


def _replicas(run: RunStatus) -> Iterator[Finding]:
    """Replicas that die, and those that wait for storage."""
    harvest = run.said.get("harvest", {})
    if "harvesting" not in run.phase:
        return
    if (deaths := harvest.get("deaths", 0)) or harvest.get("expired"):
        gone = f"{deaths} died" + (f", {harvest['expired']} gave no sign of life" if harvest.get("expired") else "")
        yield Finding(f"replicas were lost: {gone}", "the log says why; out of memory: lower harvest.batch_memory_gb")
    at_work = {name: facts for name, facts in harvest.items() if isinstance(facts, Mapping)}
    waiting = [name for name, facts in at_work.items() if _number(facts, "blocked") > BLOCKED]
    if waiting:
        share = max(_number(at_work[name], "blocked") for name in waiting)
        yield Finding(
            f"{', '.join(waiting[:4])} wait for storage up to {share:.0%} of the time: writing the store is the "
            "slower side",
            "fewer replicas do, or a faster place for store=",
        )


def _alarms(run: RunStatus) -> Iterator[Finding]:
    """What the run's own alerts watch for beyond that: units that do not come, and what it has cost."""
    training = [line for line in run.training[-1:] if _has(line, "time", "seconds")]
    harvest = [line for line in run.harvest if _has(line, "time", "units", "of", "held_s")]
    try:
        config = load(AlertsConfig, run.config.get("alerts") or {})
    except UserError:  # of another version
        return
    for alert in decide([*harvest, *training], config, now=run.now, disk_free=None):
        if alert.name in ("no_commit", "cost"):
            what, _, do = alert.text.partition("; ")
            yield Finding(what, do)


def _learning(run: RunStatus) -> Iterator[Finding]:
    """What is amiss with the dictionaries: latents that died, steps that were dropped."""
    newest = run.training[-1] if run.training else {}
    for key, value in newest.items():
        prefix, figure = split_name(key)
        of = f"{prefix.rstrip('/')}: " if prefix else ""
        if figure == "dead_fraction" and _number(newest, key) > DEAD:
            yield Finding(
                f"{of}{value:.0%} of the latents are dead", "lower sae.dead_after_tokens, sae.n_latents or train.lr"
            )
        elif figure in ("skipped_steps", "roll_backs") and _number(newest, key) > 0:
            what = "bad steps were dropped" if figure == "skipped_steps" else "times it rolled back to a checkpoint"
            yield Finding(f"{of}{value} {what}", "metrics.jsonl says which; see `sae-dist store stats`, lower train.lr")


def _has(line: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(line.get(key), int | float) for key in keys)


def _number(facts: Mapping[str, Any], key: str) -> float:
    value = facts.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
