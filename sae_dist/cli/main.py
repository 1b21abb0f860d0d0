"""`sae-dist COMMAND key=value ...`: finds the command, turns mistakes into one line and outcomes into exit codes.

Exit codes: 0 done; 2 bad configuration or input; 3 some points of a sweep failed; 75 stopped before the end, or storage
did not answer, run again to resume; anything else is our fault.
"""

import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

import yaml

import sae_dist
from sae_dist.config import Stopped, UserError
from sae_dist.exit_codes import BAD_INPUT, DONE, STOPPED
from sae_dist.service.signals import on_signals
from sae_dist.storage import Unavailable
from sae_dist.system_errors import user_error

COMMANDS = {  # each is a module of this package with main(values) -> exit code
    "run": "harvest, train, evaluate, feature pages; resumes by itself when repeated",
    "harvest": "text and model -> activation store; many hook points in one pass",
    "train": "activation store -> dictionary",
    "evaluate": "FVU, L0, dead share, density, loss recovered; on held-out tokens",
    "pages": "feature pages: a static site that opens from disk",
    "label": "a label for every latent, and how good they are on contexts that the labeller has not seen",
    "steer": "clamp latents while the model writes; attribute logits to latents; find latents by example text",
    "compare": "what dictionaries have in common: shared latents, splitting, what the larger one adds, co-activation",
    "sweep": "many configurations of a command, each trained once, in shared passes; resumes, adds points",
    "status": "what a run is doing, from its files alone",
    "serve": "runs, members, sweeps and pages for a team, on the loopback unless told",
    "sync": "a run's W&B history rebuilt from metrics.jsonl",
    "plan": "memory, traffic, tokens/s, storage and price of a run before it is started",
    "submit": "a command as a job on a Ray cluster, Slurm, Kubernetes, SkyPilot or torchrun",
    "jobs": "the jobs that were submitted: list, follow, stop",
    "export": "a dictionary as another tool's files: SAELens, sparsify, circuit-tracer, ...; onto the Hugging Face Hub",
    "import": "a dictionary from another tool's files: those, Gemma Scope, Llama Scope, ...; from the Hugging Face Hub",
    "store": "ls, stats, verify, gc, import, copy of activation stores",
}
MULTIRUN = {"-m", "--multirun"}  # as Hydra has it: of several values of a key each


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    more = "`sae-dist COMMAND --help` lists the keys of a command."
    return f"usage: sae-dist COMMAND [key=value ...]\n\n{sae_dist.__doc__}\n\n{lines}\n\n{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(sae_dist.__version__)
        return 0
    command, *overrides = arguments
    if command not in COMMANDS:
        print(f"error: unknown command {command}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes share cores: spinning threads would steal them
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "botocore", "aiobotocore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    on_signals(_stop, (signal.SIGTERM, signal.SIGHUP))
    try:
        return _dispatch(command, overrides)
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (OSError, MemoryError, RuntimeError) as error:
        if (refused := user_error(error)) is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, Stopped) as stop:
        with contextlib.suppress(OSError):  # the terminal or the reader of the pipe may be gone
            print(f"stopped{f': {stop}' if str(stop) else ''}; run the same command again to resume", file=sys.stderr)
        return STOPPED


def _dispatch(command: str, overrides: list[str]) -> int:
    # After the checks above: Hydra and torch take seconds to load.
    from sae_dist.cli.compose import compose, help_text, spelled_out

    if MULTIRUN & set(overrides):
        command, overrides = "sweep", [command, *(each for each in overrides if each not in MULTIRUN)]
    module = importlib.import_module(f"sae_dist.cli.{command}")
    if {"-h", "--help"} & set(overrides):
        _print(help_text(command, module.__doc__ or ""))
        return 0
    show, words = "--cfg" in overrides, [word for word in overrides if word != "--cfg"]
    if hasattr(module, "of_command"):  # its first argument is another command, whose keys it takes
        return module.of_command(words, show=show)
    values = compose(command, spelled_out(command, words))
    if show:
        _print(yaml.safe_dump(values, sort_keys=False))
        return 0
    return module.main(values)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(signal_name: str) -> None:
    raise Stopped(signal_name)
