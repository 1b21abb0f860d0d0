"""The plot of the figures of peers.py: `python -m benchmarks.plot_peers` writes docs/images/peers.svg.

Plain Python: the same results give the same file, byte for byte.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "docs/images/peers.svg"
PANELS = {  # the title of a panel, and the results that it shows
    "AVX-512 machine, two busy cores": "peers.json",
    "AVX2 machine, two cores, alone": "peers_avx2.json",
}
NAMES = {"ours": "sae_dist", "sae_lens": "SAELens", "llamascopium": "Llamascopium"}  # the others' are their own
WIDTH, LEFT, LONGEST, LINE, PANEL = 760, 170, 480, 26, 44  # pixels; PANEL: of a panel's title


def rates(results: Mapping[str, Any]) -> dict[str, int]:
    """Tokens/s of every trainer in its fastest mode, the fastest first."""
    found = {
        NAMES.get(contender.removesuffix("/fast"), contender.removesuffix("/fast")): figures["tokens_per_second"]
        for contender, figures in results["contenders"].items()
        if contender.endswith("/fast")
    }
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def plot(panels: Mapping[str, Mapping[str, int]]) -> str:
    """Horizontal bars, a panel a machine, each to its own scale."""
    lines, y = [], 34
    for title, found in panels.items():
        lines.append(f'<text x="{LEFT}" y="{y + 24}" font-weight="bold">{title}</text>')
        lines += _bars(found, y + PANEL)
        y += PANEL + LINE * len(found)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 12}" font-family="sans-serif" '
        'font-size="14" fill="#222">'
    )
    what = "Tokens/s of a whole training step: 16,384 latents, k 32, batch 4,096, each in its fastest mode"
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>',
                      f'<text x="12" y="24">{what}</text>', *lines, "</svg>\n"])  # fmt: skip


def _bars(found: Mapping[str, int], top: int) -> Iterator[str]:
    most = max(found.values())
    for row, (name, rate) in enumerate(found.items()):
        y, length = top + LINE * row, round(LONGEST * rate / most)
        colour = "#1f5f99" if name == "sae_dist" else "#b5b5b5"
        yield f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{length}" height="18" fill="{colour}"/>'
        yield f'<text x="{LEFT + length + 8}" y="{y + 14}">{rate:,}</text>'


def image() -> str:
    """The plot of the results that are kept."""
    results = {title: ROOT / "benchmarks/results" / name for title, name in PANELS.items()}
    return plot({title: rates(json.loads(path.read_text(encoding="utf-8"))) for title, path in results.items()})


if __name__ == "__main__":
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    IMAGE.write_text(image(), encoding="utf-8")
