"""Histograms of a comparison as SVG within the page, whose styles give the colours of either scheme."""

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BELOW = 420, 130, 6, 20  # units of the picture, and room left of the bars and below them
MARKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def histogram(found: Sequence[int], chance: Sequence[int], median: float | None) -> str:
    """Counts in equal parts of 0 to 1 as bars, those by chance as a line, and the median of what was found."""
    width = (WIDTH - 2 * LEFT) / len(found)
    top = max(*found, *chance, 1)

    def height(count: int) -> float:
        return (HEIGHT - 8) * count / top

    bars = "".join(
        f'<rect class="bar" x="{LEFT + at * width + 0.5:.2f}" y="{HEIGHT - height(count):.2f}" '
        f'width="{width - 1:.2f}" height="{height(count):.2f}"/>'
        for at, count in enumerate(found)
        if count
    )
    steps = "".join(f"V{HEIGHT - height(count):.2f}H{LEFT + (at + 1) * width:.2f}" for at, count in enumerate(chance))
    line = f'<path class="chance" d="M{LEFT} {HEIGHT}{steps}V{HEIGHT}"/>' if any(chance) else ""
    middle = "" if median is None else _median(median)
    marks = "".join(
        f'<text x="{_place(mark):.2f}" y="{HEIGHT + 15}" text-anchor="{_anchor(mark)}">{mark:g}</text>'
        for mark in MARKS
    )
    ground = f'<line class="ground" x1="{LEFT}" y1="{HEIGHT}" x2="{WIDTH - LEFT}" y2="{HEIGHT}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + BELOW}" role="img">{bars}{line}{middle}{ground}{marks}</svg>'


def _place(value: float) -> float:
    return LEFT + (WIDTH - 2 * LEFT) * min(max(value, 0.0), 1.0)


def _anchor(mark: float) -> str:
    return {0.0: "start", 1.0: "end"}.get(mark, "middle")


def _median(value: float) -> str:
    return f'<line class="median" x1="{_place(value):.2f}" y1="0" x2="{_place(value):.2f}" y2="{HEIGHT}"/>'
