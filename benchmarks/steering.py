"""Does a latent that a search found turn text towards its category? `python -m benchmarks.steering RUN`.

For each category: the latent that carries most of the difference in means, clamped at multiples of its maximum, beside
the difference in means and a random latent at the same norm. A naive Bayes classifier on tokens, trained on training
text and judged on held-out text, says of which category a sample is. Shares have Wilson's 95 % intervals.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_dist.service.steer_job import SteeredRun
from sae_dist.steer import sample, study
from sae_dist.steer.config import SteerConfig
from sae_dist.steer.contrast import contrast, tell_apart
from sae_dist.steer.labels import labels
from sae_dist.text.stream import TokenStream
from sae_dist.train.members import MAIN

logger = logging.getLogger("steering")
LEAST = 4  # documents of a category that the classifier knows


class Classifier(NamedTuple):
    """Naive Bayes on tokens, every category as likely as the others."""

    names: list[str]
    log_odds: Tensor  # [n_categories, vocab]

    def __call__(self, tokens: list[int]) -> str:
        return self.names[int(self.log_odds[:, tokens].sum(1).argmax())]


def train(stream: TokenStream, vocab: int) -> Classifier:
    counts = {name: torch.zeros(vocab) for name, n in stream.categories().items() if name and n >= LEAST}
    for name, tokens in documents(stream):
        if name in counts:
            counts[name] += torch.bincount(torch.as_tensor(tokens), minlength=vocab)
    likely = torch.stack([own + 0.1 for own in counts.values()])
    return Classifier(list(counts), (likely / likely.sum(1, keepdim=True)).log())


def documents(stream: TokenStream) -> Iterator[tuple[str | None, np.ndarray]]:
    for row, category in enumerate(stream.documents["category"].to_pylist()):
        yield category, stream.tokens[stream.starts[row] : stream.starts[row + 1]][1:].astype(np.int64)


def accuracy(classify: Classifier, stream: TokenStream, length: int) -> dict[str, Any]:
    """On held-out windows of the length of a sample, by category."""
    right: dict[str, list[bool]] = {}
    for category, tokens in documents(stream):
        if category in classify.names:
            for start in range(0, len(tokens) - length + 1, length):
                found = classify(tokens[start : start + length].tolist())
                right.setdefault(str(category), []).append(found == category)
    return {name: {"windows": len(own), "accuracy": sum(own) / len(own)} for name, own in right.items()}


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    p, z2 = k / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def judged(of: SteeredRun, condition: study.Condition, config: SteerConfig, classify: Classifier, category: str):
    """The share of samples of the category, and how surprising they are to the model without a clamp."""
    prompt = sample.prompt_tokens(of.model, str(config.prompt), of.separator)
    with condition(config.span(len(prompt))):
        written = sample.write(
            of.model, prompt, samples=config.samples, max_tokens=config.max_tokens, temperature=config.temperature,
            seed=config.seed,
        )  # fmt: skip
    read = sample.read(of.model, written, len(prompt))
    found = [classify(row) for row in written[:, len(prompt) :].tolist()]
    k, n = found.count(category), len(found)
    surprise = [each.surprise for each in read if each.surprise is not None]
    return {
        "share": k / n, "interval": wilson(k, n), "surprise": sum(surprise) / max(1, len(surprise)),
        "examples": [each.text for each in read[:3]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--categories", nargs="+", default=["bible", "licence"])
    parser.add_argument("--multiples", nargs="+", type=float, default=[2.0, 4.0])
    parser.add_argument("--prompt", default="In the morning we")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/steering.json")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    of = SteeredRun(given.run, MAIN)
    classify = train(of.train, of.model.model.config.vocab_size)
    named = labels(given.run)
    subject = study.Subject(of.model, of.dictionary, of.activity(given.run), of.separator, of.sequences(0), named)
    results: dict[str, Any] = {
        "model": of.model.name, "hook": of.hook, "prompt": given.prompt, "samples": given.samples,
        "new_tokens": given.length, "classifier": accuracy(classify, of.heldout, given.length), "categories": {},
    }  # fmt: skip
    for category in given.categories:
        search = SteerConfig(toward=f"cat:{category}", tokens=given.tokens)
        told = contrast(of.batches(search), of.encode, n_latents=of.dictionary.n_latents)
        apart = tell_apart(told, of.dictionary.parameters.W_dec)
        (latent,) = apart.best(1)
        own: dict[str, Any] = {
            "latent": latent, "label": named.get(latent), "share_of_difference": float(apart.share[latent]),
            "auc": float(apart.auc[latent]), "q": float(apart.q[latent]),
        }  # fmt: skip
        results["categories"][category] = own
        for multiple in given.multiples:
            config = SteerConfig(
                prompt=given.prompt, clamp={latent: f"{multiple:g}x"}, samples=given.samples, max_tokens=given.length
            )
            steps, facts = study.conditions(config, subject, told.difference_in_means)
            own[f"{multiple:g}x"] = figures = {"norm": facts["norm"], "random_latent": facts["random_latent"]}
            for name, condition in steps.items():
                if name == study.WITHOUT:
                    if name not in own:
                        own[name] = judged(of, condition, config, classify, category)
                    continue
                figures[name] = judged(of, condition, config, classify, category)
                logger.info("%s %gx, %s: %s", category, multiple, name, figures[name])
                given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
