"""Named points at which a test can kill, stop or break a real process; a no-op unless SAE_DIST_FAULTS is set.

    SAE_DIST_FAULTS='[{"point": "writer.before_commit", "action": "kill", "where": {"unit": 3}, "nth": 1}]'

`where` keeps the rule to calls with these values, `nth` to the n-th such call of the process (0: every one), `once`
(the path of a file that is not there yet) to the first of all processes that comes to it.
Actions: kill (SIGKILL), stop (SIGSTOP), raise (OSError), sleep (`seconds`).
"""

import functools
import json
import os
import signal
import time
from collections import Counter
from typing import Any

from sae_dist.config import UserError

ACTIONS = ("kill", "stop", "raise", "sleep")


class InjectedFault(OSError):
    """The I/O error of the action `raise`."""


def point(name: str, **where: object) -> None:
    """A named point for faults; `where` tells the calls of one point apart."""
    if "SAE_DIST_FAULTS" in os.environ:
        _act(name, where, os.environ["SAE_DIST_FAULTS"])


def _act(name: str, where: dict[str, object], script: str) -> None:
    rules, seen = _parse(script)
    for index, rule in enumerate(rules):
        if rule["point"] != name or any(where.get(k) != v for k, v in rule.get("where", {}).items()):
            continue
        seen[index] += 1
        if rule.get("nth", 1) not in (0, seen[index]) or not _is_first(rule.get("once")):
            continue
        match rule["action"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise InjectedFault(f"fault at {name} {where}")
            case "sleep":
                time.sleep(rule["seconds"])


def _is_first(path: str | None) -> bool:
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@functools.lru_cache(maxsize=8)  # the counts of passes live as long as the script that counts them
def _parse(script: str) -> tuple[list[dict[str, Any]], Counter[int]]:
    rules = json.loads(script)
    for rule in rules:
        if rule.get("action") not in ACTIONS:
            raise UserError(f"SAE_DIST_FAULTS: action={rule.get('action')!r}; use one of {', '.join(ACTIONS)}")
    return rules, Counter()
