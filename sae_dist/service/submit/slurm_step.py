"""In a job of Slurm: the attempts, and the job back into the queue when its run was stopped and has saved.

A time limit, a preemption, `scancel --signal=TERM` and a killed batch script end like that; `scancel` alone and
`sae-dist jobs stop=` do not come back.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sae_dist.service.signals import STOP_SIGNALS
from sae_dist.service.submit.attempts import STOPPED, parse
from sae_dist.service.submit.slurm import facts_of

logger = logging.getLogger(__name__)
REASONS = ("TimeLimit", "NonZeroExitCode", "JobLaunchFailure")  # Slurm's words; of a cancelled job it is None


def main() -> int:
    attempts, number = parse(), os.environ["SLURM_JOB_ID"]

    def on_stop() -> None:
        """Slurm may be ending the job, and kills its processes soon: the run may not have saved by then.

        The request before the time limit finds the job running, the one at the limit, if it comes to that, does not.
        """
        with undisturbed():
            if was_ended(facts := facts_of(number)):
                requeue(facts, attempts.tries)

    code = attempts.run(on_stop)
    if attempts.stopped and code == STOPPED:
        with undisturbed():
            if (facts := facts_of(number))["JobState"] == "RUNNING":
                requeue(facts, attempts.tries)
    return code


def was_ended(facts: Mapping[str, str]) -> bool:
    """Whether Slurm ends the job though nobody cancelled it: its time is up, or its batch script was killed."""
    return facts["JobState"] == "COMPLETING" and facts.get("Reason") in REASONS


def requeue(facts: Mapping[str, str], tries: int) -> None:
    """The job back into the queue, if it may go there."""
    number, started = facts["JobId"], int(facts["Restarts"]) + 1
    if facts["Requeue"] == "0":
        logger.info("job %s was asked to stop; it does not go back into the queue", number)
    elif started >= tries:
        logger.warning("job %s has been started %d times, as often as tries= says", number, started)
    else:
        logger.info("job %s goes back into the queue", number)
        subprocess.run(["scontrol", "requeue", number], check=False)  # which says itself why not


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
