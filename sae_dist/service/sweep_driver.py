"""A driver of a sweep: takes points, starts a process for each pass of them, and says what came of every one.

All that it knows lies in the sweep's folder: the ledger says who has which point, a pass's folder how far it is. So it
may die at any moment, be started again, or share the sweep with other drivers, of this machine or of others.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist import storage
from sae_dist.config import UserError, digest
from sae_dist.exit_codes import BAD_INPUT, STOPPED
from sae_dist.monitor.config import keep_secrets
from sae_dist.service.display import progress
from sae_dist.service.passes import clear, hand_out, is_finished, read_record, write_record
from sae_dist.service.run_folder import is_claimed, read_status
from sae_dist.service.sweep_points import Planned
from sae_dist.service.sweep_room import Memory, Slot
from sae_dist.service.sweep_stages import Stages
from sae_dist.shards import stores
from sae_dist.shards.reader import Store
from sae_dist.sweep import group
from sae_dist.sweep.config import SweepConfig
from sae_dist.sweep.folder import SweepFolder, of_ledger
from sae_dist.sweep.group import Candidate
from sae_dist.sweep.ledger import Ledger, Outcome, Try
from sae_dist.sweep.point import Point

logger = logging.getLogger(__name__)
EVERY_S = 0.5
PAUSE_S = 30.0  # before the next pass, after one that stopped unasked: storage may still be away
GRACE_S = 120.0  # for a pass to save what it has, once it was asked to stop


class Running(NamedTuple):
    """A pass and its process."""

    path: Path
    points: list[str]
    tries: list[Try]  # of those that were not done before
    filling: Try | None  # of the store, which it fills on the way
    process: subprocess.Popen[bytes]


class Driver:
    """Call `step` until it is True; close it. `check` raises once there is a request to stop."""

    def __init__(
        self, command: str, planned: Sequence[Planned], folder: SweepFolder, config: SweepConfig, *, ledger: Ledger,
        places: Sequence[Slot], memory: Memory, retry: bool, check: Callable[[], None],
    ) -> None:  # fmt: skip
        self._command, self._folder, self._config, self._ledger = command, folder, config, ledger
        self._stages, self._check = Stages(planned, config.halving, folder, ledger), check
        self._planned = self._stages.trainings
        self._memory, self._places, self._running = memory, places, dict[int, Running]()  # by number of the place
        self._paused_until = 0.0  # of the monotonic clock
        self._filled: set[str] = set()
        self._filling: dict[str, Store] = {}
        self._place = storage.open(folder.path)
        ledger.refresh()
        for each in planned:
            ledger.add(each.id, each.overrides)
        # what may have been tried when this driver began, and failed, is not open to it again
        self._failed_before = {point: ledger.tries(point) for point in self._planned} if retry else {}

    def points(self) -> list[Point]:
        return [of_ledger(self._ledger, self._place, point) for point in self._stages.points]

    def step(self) -> bool:
        """Takes in what has ended and starts what may start; whether there is nothing left to do or to wait for."""
        self._ledger.refresh()
        for place, each in list(self._running.items()):
            if each.process.poll() is not None:
                del self._running[place]
                self._take_in(each)
            elif not any(self._ledger.counts(taken) for taken in each.tries):
                logger.warning("%s: another driver took this one for dead and has its points; leaving them", each.path)
                each.process.kill()
        self._check()
        self._stages.compare()
        while self._may_start() and not self._reached() and self._start_next():
            pass
        return not self._running and (self._reached() or all(map(self._is_settled, self._stages.points)))

    def counts(self) -> dict[str, Any]:
        states = [self._ledger.state(point) for point in self._stages.points]
        mine = sum(len(each.tries) for each in self._running.values())
        facts = {"done": states.count("done"), "of": len(states), "training": mine, "failed": states.count("failed")}
        return facts | {"with other drivers": others} if (others := states.count("leased") - mine) > 0 else facts

    def facts(self) -> dict[str, dict[str, Any]]:
        """How far the pass in every place is."""
        found: dict[str, dict[str, Any]] = {f"pass {place}": {} for place in range(len(self._places))}
        for place, each in self._running.items():
            status, job = read_status(each.path) or {}, self._planned[each.points[0]].config
            own = {"points": len(each.points)} | dict(status.get("harvest") or {}) | progress(each.path, job.train)
            flat = {key: value for key, value in own.items() if not isinstance(value, Mapping)}
            found[f"pass {place}"] = flat
        return found

    def close(self) -> None:
        """Asks all passes to save and stop, waits for them, and gives back what they have not done."""
        for each in self._running.values():
            each.process.terminate()
        until = time.monotonic() + GRACE_S
        for each in self._running.values():
            try:
                each.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                logger.warning("%s did not stop within %.0f s; its last checkpoint counts", each.path, GRACE_S)
                each.process.kill()
                each.process.wait()
            self._take_in(each, stopping=True)
        self._running = {}

    def _is_settled(self, point: str) -> bool:
        """Whether nobody works on the point, nor will."""
        turn = self._stages.turn(point)
        over = self._ledger.state(point) in ("done", "failed")
        return over and not self._is_open(turn) and self._ledger.state(turn) != "leased"

    def _reached(self) -> bool:
        """Whether a point has come down to the FVU at which the sweep may end."""
        target = self._config.target_fvu
        figures = [point.summary["eval"].get("fvu") for point in self.points() if point.summary] if target else []
        return any(fvu is not None and fvu <= target for fvu in figures)

    def _is_open(self, point: str) -> bool:
        """Whether this driver may take the point."""
        match self._ledger.state(point):
            case "pending":
                return True
            case "done":  # a folder that somebody removed is made again
                return not (Path(str(self._planned[point].config.out)) / "summary.json").exists()
            case "failed":
                return self._ledger.tries(point) <= self._failed_before.get(point, -1)
            case _:
                return False

    def _may_start(self) -> bool:
        return len(self._running) < len(self._places) and time.monotonic() >= self._paused_until

    def _start_next(self) -> bool:
        """Starts a pass where one may start: one that was begun, else the first of those that the open points make."""
        stores = {name: self._may_fill(name) for name in {each.store for each in self._planned.values()}}
        turns = map(self._stages.turn, self._stages.points)
        still_open = [turn for turn in turns if self._is_open(turn) and stores[self._planned[turn].store]]
        for points in [*self._begun(set(still_open)), *self._grouped(still_open)]:
            if self._start(points, still_open):
                return True
        return False

    def _begun(self, still_open: set[str]) -> list[list[str]]:
        """Passes that another start of a driver has left: finished ones with open points, and ones all of them open."""
        found = []
        for path in sorted(self._folder.path.glob("passes/*/pass.json")):
            points = list(read_record(path.parent)["points"])
            finished, missing = is_finished(path.parent), set(points) - still_open
            whole = not missing and all(len(points) <= (self._ledger.most(p) or len(points)) for p in points)
            if set(points) <= self._planned.keys() and (whole or (finished and len(missing) < len(points))):
                found.append(points)
        return found

    def _grouped(self, still_open: Sequence[str]) -> list[list[str]]:
        candidates = [Candidate(p, self._planned[p].shared, self._ledger.most(p)) for p in still_open]
        free = len(self._places) - len(self._running)
        return group.passes(candidates, fits=self._fits, most=self._config.points_per_pass, at_once=free)

    def _fits(self, points: Sequence[str]) -> bool:
        return self._memory.fits([self._planned[p].config for p in points], self._planned[points[0]].sizes)

    def _may_fill(self, name: str | None) -> bool:
        """Whether this store of the sweep is full, or free for this driver to fill; None: a store that is given."""
        if name is None or name in self._filled:
            return True
        place = storage.open(self._folder.store(name))
        if name not in self._filling and place.exists("store.json"):
            self._filling[name] = stores.open(place)
        if (store := self._filling.get(name)) is not None and len(store.committed()) == store.meta.n_units:
            self._filled.add(name)
            return True
        return self._ledger.state(f"store-{name}") == "pending"

    def _start(self, points: list[str], still_open: Sequence[str]) -> bool:
        """Takes the open ones of these points and starts their pass; False where another driver was first."""
        filling, name = None, self._planned[points[0]].store
        if name is not None and name not in self._filled:
            filling = self._ledger.take(f"store-{name}", together=1)
            if filling is None:
                return False
        tries, done = list[Try](), [point for point in points if point not in still_open]
        for point in points:
            if point in still_open and (taken := self._ledger.take(point, together=len(points))) is not None:
                tries.append(taken)
            elif not tries and point in still_open:  # another driver is at this very pass
                break
        if not tries:
            if filling is not None:
                self._ledger.end(filling, "stopped")
            return False
        members = sorted(done + [taken.point for taken in tries])
        path = self._folder.pass_(digest(members)[:12])
        path.mkdir(parents=True, exist_ok=True)
        self._wait_for_orphan(path)
        keep_secrets(self._planned[members[0]].config.alerts)
        write_record(path, self._command, {point: self._planned[point].values for point in members})
        if is_finished(path):  # by a driver that died before it could hand out
            if filling is not None:
                self._ledger.end(filling, "stopped")
            self._hand_out(path, tries)
            return True
        place = next(place for place in range(len(self._places)) if place not in self._running)
        self._running[place] = Running(path, members, tries, filling, _process(path, self._places[place]))
        logger.info("%s: %d point%s in one pass", path, len(members), "s" * (len(members) > 1))
        return True

    def _wait_for_orphan(self, path: Path) -> None:
        """The process of a driver that was killed saves its pass and ends; nobody else may work in its folder yet."""
        said = False
        while is_claimed(path):
            if not said:
                logger.info("%s: waiting for the process of a driver that is gone to save it", path)
            said = True
            self._check()
            time.sleep(EVERY_S / 2)

    def _take_in(self, each: Running, *, stopping: bool = False) -> None:
        """Says what came of a pass that has ended."""
        if each.process.stdin is not None:
            each.process.stdin.close()
        if each.filling is not None:
            self._ledger.end(each.filling, "stopped")
        code = each.process.returncode
        if is_finished(each.path):
            try:
                self._hand_out(each.path, each.tries)
                return
            except storage.Unavailable as away:  # the pass is whole, and handed out later
                why, code = str(away), STOPPED
            except UserError as damage:
                why = str(damage)
                clear(each.path)
        else:
            why = _why(each.path, code)
        if stopping or code == STOPPED:
            self._say(each, "stopped")
            if not stopping:  # it was stopped alone, or its storage does not answer: no fault of its points
                logger.warning("%s: the pass stopped early (%s); going on in %.0f s", each.path, why, PAUSE_S)
                self._paused_until = time.monotonic() + PAUSE_S
        elif code != BAD_INPUT and all(self._died(taken.point) < self._config.tries - 1 for taken in each.tries):
            logger.warning("%s: its process died (%s); trying again", each.path, why)
            self._say(each, "died", why)
        elif len(each.points) > 1:
            logger.warning("%s: the pass failed (%s); trying halves of its points", each.path, why)
            self._say(each, "split", why)
        else:
            logger.error("point %s failed: %s (%s)", each.points[0], why, each.path / "pass.log")
            self._say(each, "failed", why)

    def _say(self, each: Running, outcome: Outcome, failure: str | None = None) -> None:
        for taken in each.tries:
            self._ledger.end(taken, outcome, failure=failure)

    def _died(self, point: str) -> int:
        return sum(ended.outcome == "died" for ended in self._ledger.ends(point))

    def _hand_out(self, path: Path, tries: Sequence[Try]) -> None:
        """Gives points of a finished pass their folders, then says that they are done."""
        mine = [taken for taken in tries if self._ledger.counts(taken)]
        seconds = hand_out(path, {t.point: self._planned[t.point].config for t in mine})
        price = self._config.price_hour
        for taken in mine:
            own = round(self._stages.seconds(taken.point, seconds[taken.point]), 3)
            cost = None if price is None else round(own / 3600 * price, 6)
            self._ledger.end(taken, "done", seconds=own, cost=cost)
        if mine:
            clear(path)


def _process(path: Path, slot: Slot) -> subprocess.Popen[bytes]:
    """The process of a pass. It ends with this one: its standard input is a pipe, which is closed then."""
    environment = dict(os.environ)
    if slot.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    with (path / "pass.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sae_dist", "sweep", "pass", str(path)], stdin=subprocess.PIPE, stdout=log,
            stderr=log, env=environment,
        )  # fmt: skip
    if slot.cores is not None:
        os.sched_setaffinity(process.pid, slot.cores)  # before it starts threads, which inherit it
    return process


def _why(path: Path, code: int) -> str:
    """Why the process of a pass ended as it did, in a line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    said = [line for line in (path / "pass.log").read_text(errors="replace").splitlines() if line.strip()]
    error = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "")
    return error.removeprefix("error: ")[:500] or f"exit code {code}"
