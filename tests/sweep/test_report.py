"""The report opens from disk, loads nothing from elsewhere, and shows what the points hold, whatever they hold."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sae_dist.sweep.plots import plots
from sae_dist.sweep.point import Point
from sae_dist.sweep.report import write_report
from sae_dist.sweep.tables import analyse, report_tables
from tests.sweep import planted

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"
FAILED = Point("feed", {"sae.n_latents": 262144, "sae.k": 16}, "failed", 3, failure=f"=1+1 {HOSTILE}")
GRID = planted.points([4096, 16384, 65536], [16, 32, 64])


class Page(HTMLParser):
    """What a page names, and its tables as text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.policy = ""
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.rows = [row for row in self.rows if row]

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [value for name in ("src", "href", "srcset", "data") if (value := values.get(name))]
        assert not [name for name in values if name.startswith("on") or name == "style"]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "report"
    (out / "plots").mkdir(parents=True)
    (out / "plots/of_an_earlier_report.svg").write_text("<svg/>")
    write_report([FAILED, *reversed(GRID)], out, title=HOSTILE, extrapolate_to=1_048_576)
    return out


def test_the_page_is_static_and_loads_what_lies_beside_it_alone(folder):
    found = page(folder)
    assert "script" not in found.tags and HOSTILE in found.text
    assert "default-src 'none'" in found.policy and "http" not in found.policy
    assert found.loads
    for target in found.loads:
        assert re.fullmatch(r"[\w./]+", target) and (folder / target).is_file(), target
    css = (folder / "report.css").read_text()
    assert "url(" not in css and "@import" not in css
    assert not (folder / "plots/of_an_earlier_report.svg").exists()


def test_the_page_shows_every_point_the_law_and_the_failure(folder):
    found = page(folder)
    cells = {row[0]: row for row in found.rows}
    for each in GRID:
        assert f"{each.summary['eval']['fvu']:.4g}" in cells[each.id]
    assert ["sae.n_latents=262144, sae.k=16", "3", FAILED.failure] in found.rows
    assert any(row[0] == "γ" and row[-1] == "-0.042" for row in found.rows)
    assert [row[:2] for row in found.rows if row[0] == "1,048,576"] == [["1,048,576", k] for k in ("16", "32", "64")]
    assert "16 times the largest size" in found.text
    assert "Not measured in this sweep: loss recovered" in found.text


def test_every_plot_is_an_svg_and_a_png_with_a_mark_for_each_point(folder):
    found = {plot.name: plot for plot in plots(analyse([*GRID, FAILED], 1_048_576))}
    assert {f"{name}.{kind}" for name in found for kind in ("svg", "png")} == {
        path.name for path in (folder / "plots").iterdir()
    }
    assert {"fvu_by_n_latents", "l0_by_k", "dead_fraction_by_flops", "frontier_fvu", "law0", "law1_residuals"} <= {
        *found
    }
    for name in found:
        image = (folder / f"plots/{name}.svg").read_text(encoding="utf-8")
        assert image.count('aria-roledescription="point"') == len(GRID), name
        assert not re.search(r"(href|src)=|url\((?!#)|<script", image.replace("xmlns:xlink", "")), name
        assert "prefers-color-scheme:dark" in image and "NaN" not in image
        assert (folder / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_same_points_are_there_as_csv_and_json(folder):
    lines = list(csv.DictReader((folder / "points.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["id"] for line in lines] == [each.id for each in [*GRID, FAILED]]
    assert float(lines[3]["fvu"]) == GRID[3].summary["eval"]["fvu"]
    assert lines[-1]["failure"] == f"'{FAILED.failure}"  # or a spreadsheet would compute it
    content = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    assert content["points"][0] == dataclasses.asdict(FAILED)
    assert content["tables"] == json.loads(json.dumps(report_tables([*GRID, FAILED], 1_048_576)))
    assert {line["refused"] for line in content["tables"]["laws"]} == {None}


def test_flops_are_one_dense_product_and_four_sparse_ones():
    (line,) = report_tables([planted.point(0, {"sae.n_latents": 1024, "sae.k": 16}, 0.5)])["points"]
    assert line["flops"] == 1_000_000 * (2 * 64 * 1024 + 8 * 64 * 16)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [FAILED],
        [Point("a", {}, "pending")],
        [planted.point(0, {}, 0.5)],
        [planted.point(0, {"seed": seed}, None, l0=None, dead_fraction=None) for seed in range(2)],
        [dataclasses.replace(planted.point(0, {}, 0.5), summary={"eval": {"fvu": float("nan"), "l0": True}})],
    ],
    ids=["none", "failed", "pending", "one", "nulls", "no-number"],
)
def test_a_sweep_without_figures_has_a_report_too(points, tmp_path):
    report = write_report(points, tmp_path / "r", title="small")
    found = page(tmp_path / "r")
    assert report.place == str(tmp_path / "r/index.html") and report.tables == report_tables(points)
    for name, image in report.images.items():
        assert (tmp_path / f"r/plots/{name}.png").read_bytes() == image
    assert "small" in found.text and "What to run next" in found.text
    assert "NaN" not in (tmp_path / "r/points.json").read_text()


def test_other_keys_are_axes_and_seeds_are_averaged():
    points = [
        planted.point(number, {"train.lr": rate, "sae": kind, "seed": seed}, fvu)
        for number, (rate, kind, seed, fvu) in enumerate(
            (rate, kind, seed, 0.2 + rate + 0.01 * seed)
            for rate in (0.001, 0.01)
            for kind in ("topk", HOSTILE)
            for seed in range(3)
        )
    ]
    found = {plot.title: plot for plot in plots(analyse(points))}
    spec = found["FVU by train.lr"].spec
    values = spec["data"]["values"] if "data" in spec else spec["layer"][0]["data"]["values"]
    assert len(values) == 4 and {mark["seeds"] for mark in values} == {3}
    assert values[0]["y"] == pytest.approx(0.211) and values[0]["low"] == 0.201 and values[0]["high"] == 0.221
    assert {mark["group"] for mark in values} == {"sae=topk", f"sae={HOSTILE}"}
    assert "FVU by sae" in found


def test_a_figure_that_is_the_same_everywhere_has_an_axis_from_zero():
    points = [planted.point(k, {"sae.k": k}, 0.5, dead_fraction=0.0) for k in (4, 8)]
    found = {plot.title: plot for plot in plots(analyse(points))}
    assert '"domain": [0.0, 1.0]' in json.dumps(found["Dead share by k"].spec)


def test_the_command_line_does_not_pay_for_plots():
    heavy = "altair", "vl_convert", "scipy.optimize", "scipy.stats"
    line = f"import sys, sae_dist.sweep.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
