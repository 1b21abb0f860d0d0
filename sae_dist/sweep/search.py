"""Where to look next, as Optuna says: a function of what was tried, so that a search resumes as any sweep does."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from sae_dist.config import UserError, frozen

ASKED = 20  # times for every point that is wanted: most of a small space may have been tried


@frozen
class SearchConfig:
    """Of search=optuna: how many points, and in what steps."""

    trials: Annotated[int, Field(ge=1)] = 20  # points in all
    at_once: Annotated[int, Field(ge=1)] = 4  # points that are asked for together, to train in shared passes
    seed: int = 0


class Interval(NamedTuple):
    """All numbers from `low` to `high`; `log`: as likely in each decade."""

    low: float
    high: float
    log: bool
    whole: bool  # whole numbers alone


Space = Mapping[str, Sequence[str] | Interval]  # by key: values as they are written, or an interval


class Tried(NamedTuple):
    """A point that is over."""

    values: Mapping[str, Any]  # as in the space
    fvu: float | None  # held out; None: it failed, or has none


def ask(space: Space, tried: Sequence[Tried], config: SearchConfig) -> list[dict[str, Any]]:
    """The next points, in the space's terms; fewer at the end, none once there are `trials` or nothing new is found.

    The same points again for as long as `tried` is the same.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("search=optuna needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(optuna, of) for key, of in space.items()}
    sampler = optuna.samplers.TPESampler(seed=config.seed + len(tried), constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    for each in sorted(tried, key=lambda each: sorted(map(str, each.values.items()))):
        over = each.fvu is not None and math.isfinite(each.fvu)
        state = optuna.trial.TrialState.COMPLETE if over else optuna.trial.TrialState.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(each.values), distributions=distributions, value=each.fvu if over else None, state=state
            )
        )
    wanted, found = max(min(config.at_once, config.trials - len(tried)), 0), list[dict[str, Any]]()
    known = [dict(each.values) for each in tried]
    for _ in range(ASKED * wanted):
        if len(found) == wanted:
            break
        params = dict(study.ask(distributions).params)
        if params not in [*known, *found]:
            found.append(params)
    return found


def _distribution(optuna: Any, of: Sequence[str] | Interval) -> Any:
    if not isinstance(of, Interval):
        return optuna.distributions.CategoricalDistribution(list(of))
    if of.whole:
        return optuna.distributions.IntDistribution(int(of.low), int(of.high), log=of.log)
    return optuna.distributions.FloatDistribution(of.low, of.high, log=of.log)
