"""What a clamp does to a model, beside what other vectors of the same norm do; and what made the model's logits."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_kernels import Active
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.model.load import LanguageModel
from sae_dist.sae.dictionary import Dictionary
from sae_dist.steer import sample
from sae_dist.steer.activity import Activity
from sae_dist.steer.attach import add, attach, sites
from sae_dist.steer.attribution import ablate, attribute, logit_difference, rank_correlation
from sae_dist.steer.clamp import Clamps, Target, check_latents, resolve, values_of
from sae_dist.steer.config import SteerConfig, as_list
from sae_dist.steer.contrast import Told
from sae_dist.steer.sources import layer_read, read

logger = logging.getLogger(__name__)

WITHOUT, CLAMPED, DIFFERENCE, RANDOM = "without", "clamped", "difference in means", "random latent"
LIKELY = 6  # next tokens that are listed
HEADS = 3  # of attention, of each latent

Condition = Callable[[slice], AbstractContextManager[Any]]  # of the positions to change


class Subject(NamedTuple):
    """A model and its dictionary, on one device."""

    language_model: LanguageModel
    dictionary: Dictionary
    activity: Activity
    separator: int | None
    heldout: Int[Tensor, "sequences context"]
    labels: Mapping[int, str]  # of latents that have one


def conditions(
    config: SteerConfig, subject: Subject, difference: Float[Tensor, " d_out"] | None
) -> tuple[dict[str, Condition], dict[str, Any]]:
    """The model without and with the clamp, and with two vectors of the norm that the clamp has; and their figures."""
    model, dictionary = subject.language_model.model, subject.dictionary
    clamps, (_, writes) = resolve(config.clamp or {}, dictionary, subject.activity), sites(dictionary)
    values: dict[int, Target] = dict(zip(*(part.tolist() for part in clamps), strict=True))
    norm, sign = added(clamps, subject)
    random = random_latent(clamps, subject.activity, config.seed)
    directions = {DIFFERENCE: difference, RANDOM: dictionary.parameters.W_dec[random]}
    found: dict[str, Condition] = {
        WITHOUT: nullcontext,
        CLAMPED: lambda at: attach(model, dictionary, clamp=values, at=at),
    }
    for name, direction in directions.items():
        if direction is not None:
            found[name] = _adding(subject, writes, sign * norm * torch.nn.functional.normalize(direction, dim=0))
    return found, {"norm": norm, "sign": sign, "random_latent": random}


def _adding(subject: Subject, hook: str, vector: Float[Tensor, " width"]) -> Condition:
    return lambda at: add(subject.language_model.model, hook, vector, at=at)


def clamped(config: SteerConfig, subject: Subject) -> list[dict[str, Any]]:
    """Each clamped latent with its value, and how active it is by itself."""
    latents, values = resolve(config.clamp or {}, subject.dictionary, subject.activity)
    targets = list((config.clamp or {}).values())
    return [
        {"latent": latent, "label": subject.labels.get(latent), "target": target, "value": value,
         "maximum": float(subject.activity.maximum[latent]), "mean": float(subject.activity.mean[latent])}
        for latent, target, value in zip(latents.tolist(), targets, values.tolist(), strict=True)
    ]  # fmt: skip


def added(clamps: Clamps, subject: Subject) -> tuple[float, float]:
    """The norm of what the clamp adds to a token on which latents have their mean; -1 where it lowers them."""
    more = (clamps.values - subject.activity.mean[clamps.latents]).to(subject.dictionary.parameters.W_dec)
    vector = more @ subject.dictionary.parameters.W_dec[clamps.latents]
    return float(vector.norm()), -1.0 if float(more.sum()) < 0 else 1.0


def random_latent(clamps: Clamps, activity: Activity, seed: int) -> int:
    """One of the latents that are ever active and are not clamped; UserError where there is none."""
    alive = activity.maximum > 0
    alive[clamps.latents] = False
    others = alive.nonzero().squeeze(1)
    if not len(others):
        raise UserError(f"no other latent is active on {activity.source}, so that there is none to compare with")
    g = torch.Generator().manual_seed(seed)
    return int(others[int(torch.randint(len(others), (1,), generator=g))])


def measure(name: str, condition: Condition, config: SteerConfig, subject: Subject) -> dict[str, Any]:
    """The figures and samples of one condition."""
    model = subject.language_model
    prompt = sample.prompt_tokens(model, str(config.prompt), subject.separator)
    at = config.span(len(prompt))
    with condition(at):
        logits = sample.next_logits(model, prompt)
        logger.info("%s: %d samples of at most %d tokens", name, config.samples, config.max_tokens)
        written = sample.write(
            model, prompt, samples=config.samples, max_tokens=config.max_tokens, temperature=config.temperature,
            seed=config.seed,
        )  # fmt: skip
    everywhere = at if isinstance(config.at, tuple) else slice(1, None)  # held-out text has no prompt
    with condition(everywhere):
        logger.info("%s: the loss on %d held-out sequences", name, len(subject.heldout))
        loss = float(sample.token_losses(model, subject.heldout).mean()) if len(subject.heldout) else None
    chances = logits.softmax(0)
    tokens = {text: sample.one_token(model, text) for text in as_list(config.logits)}
    return {
        "samples": [each._asdict() for each in sample.read(model, written, len(prompt))],
        "next": [list(each) for each in sample.likely(model, logits, LIKELY)],
        "logits": {t: {"logit": float(logits[i]), "probability": float(chances[i])} for t, i in tokens.items()},
        "loss": loss,
    }


def attribution(config: SteerConfig, subject: Subject) -> dict[str, Any]:
    """The logit difference as a sum over latents, and what ablating each of the foremost really changes."""
    model, dictionary = subject.language_model, subject.dictionary
    prompt = sample.prompt_tokens(model, str(config.prompt), subject.separator)
    chosen = [sample.one_token(model, text) for text in as_list(config.logits)][:2]
    reads, writes = sites(dictionary)
    states = {hook: x[0].float() for hook, x in model.capture(prompt[None], [reads, writes]).items()}
    active = _within(dictionary.encode(states[reads]), config.span(len(prompt)))
    score, W_dec = logit_difference(model.model, writes, prompt, chosen), dictionary.parameters.W_dec
    logger.info("attribution to %d pairs of token and latent", len(active.values))
    found = attribute(score, states[writes], active, W_dec, steps=config.integrated_steps)
    latents, effects = (column[: config.shown] for column in found.of_latents())
    lost = ablate(score, states[writes], active, W_dec, latents.tolist())
    with torch.no_grad():
        difference = float(score(states[writes]))

    def by_token(latent: int) -> list[float]:
        here = found.latents == latent
        return torch.zeros(len(prompt)).index_add_(0, found.rows[here].cpu(), found.effects[here].cpu()).tolist()

    return {
        "of": as_list(config.logits)[:2],
        "difference": difference,
        "tokens": [model.tokenizer.decode([token]) for token in prompt.tolist()],
        "latents": [
            {"latent": latent, "label": subject.labels.get(latent), "attribution": effect, "ablation": own,
             "by_token": by_token(latent)}
            for latent, effect, own in zip(latents.tolist(), effects.tolist(), lost.tolist(), strict=True)
        ],
        "rank_correlation": rank_correlation(effects, lost),
    }  # fmt: skip


def sources(config: SteerConfig, subject: Subject) -> dict[str, Any]:
    """Which tokens of the prompt each latent of `sources` reads from, where it is most active after the first token."""
    model, dictionary = subject.language_model, subject.dictionary
    hook, _ = sites(dictionary)
    check_latents("sources", config.sources, dictionary)
    layer_read(hook)  # before the work
    prompt = sample.prompt_tokens(model, str(config.prompt), subject.separator)
    x = model.capture(prompt[None], [hook])[hook][0].float()
    latents = torch.tensor(config.sources, device=x.device)
    values = values_of(dictionary.encode(x), latents)[1:]
    found = []
    for at, latent in enumerate(config.sources):
        own: dict[str, Any] = {"latent": latent, "label": subject.labels.get(latent), "position": None}
        if values[:, at].any():
            position = int(values[:, at].abs().argmax()) + 1
            of = read(model, dictionary, hook, prompt, position, latent)
            heads = of.heads.sum(1)
            foremost = heads.abs().argsort(descending=True)[:HEADS].tolist()
            own |= {"position": position, "value": float(values[position - 1, at])}
            own |= {name: getattr(of, name) for name in ("layer", "stream", "mlp", "bias", "pre_activation")}
            own |= {"by_token": of.heads.sum(0).tolist(), "heads": [[head, float(heads[head])] for head in foremost]}
        found.append(own)
    return {"prompt_tokens": [model.tokenizer.decode([token]) for token in prompt.tolist()], "sources": found}


def _within(active: Active, at: slice) -> Active:
    """Without the pairs of rows outside the span."""
    rows = active.rows
    kept = (rows >= (at.start or 0)) & (rows < (len(active.offsets) if at.stop is None else at.stop))
    counts = rows[kept].bincount(minlength=len(active.offsets) - 1)
    return Active(active.values[kept], active.indices[kept], torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def search(told: Told, config: SteerConfig, labels: Mapping[int, str]) -> dict[str, Any]:
    """The latents that stand for `toward`, best first."""
    return {
        "tested": told.tested,
        "significant": int(((told.q <= 0.05) & (told.auc > 0.5)).sum()),
        "latents": [
            {"latent": latent, "label": labels.get(latent), "auc": float(told.auc[latent]), "q": float(told.q[latent]),
             "share": float(told.share[latent]), "toward": float(told.toward[latent]), "away": float(told.away[latent])}
            for latent in told.best(config.shown)
        ],
    }  # fmt: skip
