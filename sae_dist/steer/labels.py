"""Short labels of latents: those of `sae-dist label`, else the tokens that they fire on, from the feature pages."""

from pathlib import Path

from sae_dist.interpret import read_labels, site


def labels(run: Path) -> dict[int, str]:
    """Of every latent of the run that has a label or a page; empty where there are neither."""
    written = run / read_labels.FOLDER
    given = read_labels.labels(written) if (written / read_labels.SCORES).is_file() else {}
    return _tokens(run / "pages") | dict(given)


def _tokens(pages: Path) -> dict[int, str]:
    if not (pages / "index.html").is_file():
        return {}
    index, tokens = site.read(pages, "index"), site.read(pages, "tokens")
    latents = range(len(index["count"])) if index["paged"] is None else index["paged"]
    return {
        latent: " ".join(_shown(tokens[place]) for place in places)
        for latent, places in zip(latents, index["tokens"], strict=True)
        if places
    }


def _shown(token: str | list[str]) -> str:
    return token.strip() or repr(token)[1:-1] if isinstance(token, str) else token[1]
