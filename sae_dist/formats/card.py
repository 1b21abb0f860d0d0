"""The README.md of a dictionary on the Hugging Face Hub: its figures, its recipe, how to load it, tags to find it by.

It has names and numbers only: no paths of the machine on which the dictionary was made.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from sae_dist import formats
from sae_dist.hub.address import Address
from sae_dist.public_names import model_name

TAGS = ["sparse-autoencoder", "mechanistic-interpretability"]
UNKNOWN = ("None", "imported")  # as a store of activations made elsewhere has it
FIGURES = {  # of summary.json's `eval`
    "fvu": "FVU: fraction of variance unexplained",
    "l0": "L0: active latents a token",
    "dead_fraction": "dead share of latents",
    "loss_recovered": "loss recovered",
    "tokens": "held-out tokens measured on",
}


def card(
    address: Address, *, format: str, info: Mapping[str, Any], figures: Mapping[str, Any], recipe: Mapping[str, Any],
    license: str | None,
) -> str:  # fmt: skip
    """The text of README.md. `info` is config.json; a figure that is missing or null is said to be not measured."""
    hook, target = info.get("hook"), info.get("target_hook")
    kind, what = ("sparse autoencoder", f"`{hook}`") if target is None else ("transcoder", f"`{hook}` -> `{target}`")
    measured = {label: _number(figures.get(key)) for key, label in FIGURES.items()}
    return "\n".join(
        [
            front_matter(info, format=format, license=license),
            f"# {address.name}\n",
            f"A {kind} with {info['n_latents']:,} latents, of {what}{_of_model(info)}.\n",
            _table("measured on activations that were kept from training", measured),
            _table("recipe", {"kind": info["variant"], **recipe}),
            "## Load it\n",
            f"```python\n{_loading(address, format)}\n```",
            "",
        ]
    )


def front_page(address: Address, *, format: str, info: Mapping[str, Any], license: str | None) -> str:
    """The README.md of a repository of several dictionaries, which have cards of their own."""
    head = front_matter(info, format=format, license=license)
    name = address.repository.partition("/")[2]
    return f"{head}\n# {name}\n\nDictionaries, a folder each, with cards of their own.\n"


def front_matter(info: Mapping[str, Any], *, format: str, license: str | None) -> str:
    """What the Hub reads: library, tags, the licence and the model that it is of."""
    head: dict[str, Any] = {"library_name": format, "tags": [*TAGS, format] if format != formats.OWN else TAGS}
    if license is not None:
        head["license"] = license
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model := model_name(info.get("model"))):
        head["base_model"] = model
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _loading(address: Address, format: str) -> str:
    """Three lines of Python."""
    if format == "saelens":
        return "\n".join(
            (
                "from sae_lens import SAE\n",
                f'sae = SAE.from_pretrained("{address.repository}", "{address.path}", device="cpu")',
                "x_hat = sae(x)  # raw activations",
            )
        )
    if any(name.endswith(".pt") for name in formats.FORMATS[format].files):
        fetched = f'snapshot_download("{address.repository}") + "/{address.path}"'
        lines = "import sae_dist\nfrom huggingface_hub import snapshot_download\n"
        return f'{lines}\nfound = sae_dist.load({fetched}, format="{format}")'
    more = "" if format == formats.OWN else f', format="{format}"'
    lines = (
        "import sae_dist\n",
        f'found = sae_dist.load("{address}"{more})',
        "x_hat = found.reconstruct(x)  # raw activations",
    )
    return "\n".join(lines)


def _of_model(info: Mapping[str, Any]) -> str:
    return "" if (model := model_name(info.get("model"))) in UNKNOWN else f" of {model}"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {label} | {'not known' if value is None else value} |" for label, value in rows.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *lines, ""])


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
