"""Several values of a key, in Hydra's words for them."""

import pytest

from sae_dist.cli import grid
from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.service.config import TrainJob


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("sae.k=16,32", [16, 32]),
        ("seed=range(3)", [0, 1, 2]),
        ("seed=range(1,8,3)", [1, 4, 7]),
        ("sae.k=choice(8,16)", [8, 16]),
        ("sae.k=sort(32,8)", [8, 32]),
        ("train.lr=1e-4,null", [1e-4, None]),
        ("store=stores/a,s3://bucket/b", ["stores/a", "s3://bucket/b"]),
        ("sae=glob(*topk)", ["abs_topk", "batchtopk", "matryoshka_topk", "multi_topk", "topk"]),
        ("sae.k=4,4", [4]),
    ],
)
def test_all_of_hydras_ways_to_give_several_values(override, values):
    found = grid.read([override], TrainJob)
    assert found.fixed == []
    assert [grid.value(point) for (point,) in found.points()] == values


@pytest.mark.parametrize(
    "override", ["sae.k=16", "hook=[a,b]", "out='a,b'", "text=a b: c", "more_dictionaries=[{k: 8}, {k: 9}]"]
)
def test_one_value_is_no_axis(override):
    assert grid.read([override], TrainJob) == grid.Grid([override], [])


def test_points_are_all_combinations_the_last_key_fastest():
    found = grid.read(["a=1,2", "b=7", "c=x,y"], TrainJob)
    assert found.points() == [["a=1", "c=x"], ["a=1", "c=y"], ["a=2", "c=x"], ["a=2", "c=y"]]
    assert found.fixed == ["b=7"]
    assert grid.read([], TrainJob).points() == [[]]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=interval(0,1)", "has no end"),
        ("sae=glob(x*)", "matches nothing"),
        ("seed=range(20000)", "20,000 points; a sweep has 10,000 at most"),
    ],
)
def test_what_is_no_list_is_refused(override, said):
    with pytest.raises(UserError, match=said):
        grid.read([override], TrainJob)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing cannot be swept; write `sae-dist sweep COMMAND key=value ...` with one of train, run"),
        (["plan"], "plan cannot be swept"),
        (["train", "store=x", "sae.kk=1,2"], "unknown key sae.kk; did you mean sae.k?"),
        (["train", "store=x", "sae.k=2,many"], "sae.k='many': give a whole number"),
        (["train", "store=x", "sweep.job=2"], "unknown key sweep.job; did you mean sweep.jobs?"),
        (["train", "store=x", "retry=all"], "retry='all': give 'failed'"),
        (["run", "pages.latents=4"], "pages= is of one dictionary"),
    ],
)
def test_wrong_sweeps_are_one_line_and_exit_2(arguments, said, capsys):
    assert main(["sweep", *arguments, "--cfg"]) == 2
    assert said in capsys.readouterr().err


def test_cfg_shows_the_points_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["sweep", "train", "store=stores/x", "sae=topk,jumprelu", "sae.k=4,8", "only=ab,cd", "sweep.jobs=2", "--cfg"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "# 4 of `sae-dist train`:\n# sae=topk sae.k=4\n" in said
    assert "only:\n- ab\n- cd\n" in said and "jobs: 2" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_multirun_is_a_sweep(capsys, flag):
    assert main(["sweep", "train", "store=x", "seed=range(2)", "--cfg"]) == 0
    said = capsys.readouterr().out
    assert main(["train", flag, "store=x", "seed=range(2)", "--cfg"]) == 0
    assert capsys.readouterr().out == said
