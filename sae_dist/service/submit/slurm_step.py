"""In a job of Slurm: the attempts, and the job back into the queue when its run was stopped and has saved.

A time limit, a preemption, `scancel --signal=TERM` and a killed batch script end like that; `scancel` alone and
`sae-dist jobs stop=` do not come back.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sae_dist.config import UserError
from sae_dist.exit_codes import STOPPED
from sae_dist.service.signals import STOP_SIGNALS
from sae_dist.service.submit.attempts import parse
from sae_dist.service.submit.slurm import facts_of

logger = logging.getLogger(__name__)
REASONS = ("TimeLimit", "NonZeroExitCode", "JobLaunchFailure")  # Slurm's words; of a cancelled job it is None
ASK_S = 60.0  # that a busy Slurm is asked again, once the run has saved
PAUSE_S = 5.0  # between two questions


def main() -> int:
    attempts, number = parse(), os.environ["SLURM_JOB_ID"]
    settled = False  # whether the job is on its way back, or may not go there

    def on_stop() -> None:
        """Slurm may be ending the job, and kills its processes soon: the run may not have saved by then.

        The request before the time limit finds the job running, the one at the limit, if it comes to that, does not.
        Nothing may be raised here: it would end the wait for the run, which is saving.
        """
        nonlocal settled
        with undisturbed():
            if not settled and (facts := answer(number)) is not None and was_ended(facts):
                settled = requeue(facts, attempts.tries)

    code = attempts.run(on_stop)
    if attempts.stopped and code == STOPPED and not settled:
        with undisturbed():
            come_back(number, attempts.tries)
    return code


def answer(number: str) -> dict[str, str] | None:
    """What Slurm knows of the job; None, with a warning, where it does not say."""
    try:
        return facts_of(number)
    except (UserError, OSError) as error:
        logger.warning("Slurm does not say how job %s is: %s", number, error)
        return None


def come_back(number: str, tries: int) -> None:
    """The job of a run that has saved back into the queue, if it may go there; asks a busy Slurm for ASK_S."""
    until = time.monotonic() + ASK_S
    while (facts := answer(number)) is None or (may_come_back(facts) and not requeue(facts, tries)):
        if time.monotonic() > until:
            logger.error("job %s is not known to be in the queue again; if it is not, submit it again", number)
            return
        time.sleep(PAUSE_S)


def may_come_back(facts: Mapping[str, str]) -> bool:
    return facts.get("JobState") == "RUNNING" or was_ended(facts)


def was_ended(facts: Mapping[str, str]) -> bool:
    """Whether Slurm ends the job though nobody cancelled it: its time is up, or its batch script was killed."""
    return facts.get("JobState") == "COMPLETING" and facts.get("Reason") in REASONS


def requeue(facts: Mapping[str, str], tries: int) -> bool:
    """The job back into the queue, if it may go there; False where Slurm did not take the request."""
    number, started = facts["JobId"], int(facts["Restarts"]) + 1
    if facts["Requeue"] == "0":
        logger.info("job %s was asked to stop; it does not go back into the queue", number)
    elif started >= tries:
        logger.warning("job %s has been started %d times, as often as tries= says", number, started)
    else:
        logger.info("job %s goes back into the queue", number)
        return subprocess.run(["scontrol", "requeue", number]).returncode == 0  # it says itself why not
    return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that ask to stop wait meanwhile, also for the commands of Slurm: those go to all processes of a step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    sys.exit(main())
