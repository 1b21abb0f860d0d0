"""A job: a checked command line that means the same on another machine, and a name that follows from it."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import UserError, digest
from sae_dist.monitor.config import WEBHOOK, public
from sae_dist.service.run_folder import read_config, read_status

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|WEBHOOK", re.IGNORECASE)
CREDENTIALS = re.compile(r"://[^/\s]*@")
ATTEMPTS = "sae_dist.service.submit.attempts"  # what runs the command there


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked command line with absolute places, and the configuration that it composes to."""

    command: str
    arguments: tuple[str, ...]  # key=value
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if CREDENTIALS.search(argument):
                raise UserError(
                    f"{argument.partition('=')[0]}= holds a user or password before the @, which others can read in "
                    "the command; take it out and give it to the nodes by their environment"
                )

    @property
    def out(self) -> str:
        return self.values["out"]

    @property
    def id(self) -> str:
        """The same for the same configuration, fit for names of jobs everywhere: at most 40 of a-z, 0-9 and -.

        What is secret in it does not count: it may come from the environment here, or only from that of the nodes.
        """
        name = re.sub(r"[^a-z0-9]+", "-", Path(self.out).name.lower()).strip("-")[:20].strip("-")
        return "-".join(filter(None, [self.command, name, digest([self.command, public(self.values)])[:8]]))

    @property
    def joins_cluster(self) -> bool:
        """Whether the command can use several nodes."""
        return "cluster" in self.values

    def is_done(self) -> bool:
        """Whether the run's folder, as far as it can be seen from here, has just this run and says that it is done."""
        with contextlib.suppress(UserError):
            status = read_status(Path(self.out))
            if status is not None and status["state"] == "done":
                return read_config(Path(self.out)) | {"cluster": None} == public(self.values) | {"cluster": None}
        return False

    def line(self, cluster: str | None = None) -> list[str]:
        """The words of the command, on the cluster that is meant; by default on Ray of its own."""
        there = [f"cluster={cluster}"] if cluster is not None and self.joins_cluster else []
        return [self.command, *self.arguments, *there]

    def attempts(self, python: str, tries: int, cluster: str | None = None, by: str = ATTEMPTS) -> list[str]:
        """The words of a command that does the job in at most so many tries; `by` is the module that does."""
        return [python, "-m", by, f"--tries={tries}", f"--out={self.out}", *self.line(cluster)]


def refuse_webhook(words: Iterable[str]) -> None:
    """UserError, which does not show it, where a command line has the webhook's address: the command is no secret."""
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if key.partition(".")[0] == "alerts" and "webhook" in word:  # also as alerts={webhook: ...}
            raise UserError(
                f"alerts.webhook= is a secret that others could read in the command; leave it out and set {WEBHOOK} on "
                "the nodes"
            )


def left_alone(job: str) -> int:
    """Says how to follow a job again; the exit code of somebody who stops following it."""
    print(f"the job goes on; follow it again with: sae-dist jobs follow={job}")
    return 75


def environment(names: Iterable[str]) -> dict[str, str]:
    """The variables that go along with a job, by name; UserError for secrets and for what is not set."""
    for name in names:
        if SECRET.search(name):
            raise UserError(
                f"env={name} looks like a secret, and what goes along with a job can be read by everybody who sees the "
                "job; set it on the cluster's nodes instead (docs/submit.md)"
            )
        if name not in os.environ:
            raise UserError(f"env={name} is not set here; export it first, or leave it out")
    return {name: os.environ[name] for name in names}
