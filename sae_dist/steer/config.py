"""What to do to a model, and what to find out."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from sae_dist.config import frozen
from sae_dist.steer.clamp import Target

CATEGORY = "cat:"  # begins the name of a category of the run's text

Texts = str | tuple[str, ...]


@frozen
class SteerConfig:
    """A prompt, and what to ask: what a clamp does to it, what made its logits or latents, which latents to clamp."""

    prompt: str | None = None  # that the model continues
    # {latent: target}: a value, 10x its maximum, 0 (zero ablation) or mean (mean ablation)
    clamp: dict[int, Target] | None = None
    # positions to change: all (but the first, which no dictionary has seen), prompt, new, or [first, end]
    at: Literal["all", "prompt", "new"] | tuple[NonNegativeInt, PositiveInt] = "all"
    # text that shows what to steer towards: cat:NAME of the run's text, or texts; for the difference in means, and,
    # without a clamp, for the search of latents
    toward: Texts = ()
    away: Texts = ()  # what it differs from; by default all other text of the run
    logits: Texts = ()  # tokens whose logits are shown; the first less the second is attributed to latents
    # latents: which tokens of the prompt each reads from, through the last layer before the dictionary
    sources: tuple[NonNegativeInt, ...] = ()
    integrated_steps: NonNegativeInt = 0  # points of integrated gradients; 0: the gradient at the activation itself
    samples: PositiveInt = 4  # continuations of each kind
    max_tokens: PositiveInt = 60  # new ones, a sample
    temperature: NonNegativeFloat = 1.0  # 0: the most likely token each time
    loss_sequences: NonNegativeInt = 16  # held-out sequences on which the effect on the loss is measured
    tokens: PositiveInt = 65_536  # of the store, read for toward and away
    shown: Annotated[int, Field(ge=1, le=1000)] = 20  # latents that the search and the attribution list
    seed: NonNegativeInt = 0  # of the samples and of the random latent

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty; give the text that the model is to continue")
        of_prompt = [name for name in ("clamp", "logits", "sources") if getattr(self, name)]
        if of_prompt and self.prompt is None:
            raise ValueError(f"prompt is missing; {of_prompt[0]}= needs prompt=...")
        if not (of_prompt or self.toward):
            raise ValueError(
                "there is nothing to do; give clamp={LATENT: 10x}, logits=[A, B] or sources=[LATENT] with prompt=, or "
                "toward= to find latents"
            )
        if self.away and not self.toward:
            raise ValueError("away= is given without toward=; give both")
        if isinstance(self.at, tuple) and self.at[0] >= self.at[1]:
            raise ValueError(f"at={list(self.at)} is no span; give [first, end] with first < end")

    def span(self, n_prompt: int) -> slice:
        """The positions to change after a prompt of so many tokens."""
        match self.at:
            case "all":
                return slice(1, None)
            case "prompt":
                return slice(1, n_prompt)
            case "new":
                return slice(n_prompt, None)
            case first, end:
                return slice(first, end)


def as_list(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
