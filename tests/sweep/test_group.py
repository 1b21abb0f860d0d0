"""Points that want the same batches share a pass, as far as memory and what happened before allow."""

import pytest

from sae_dist.config import load, to_dict
from sae_dist.service.config import TrainJob
from sae_dist.sweep.group import Candidate, passes, shared_by


def grouped(candidates, *, most=None, at_once=1, holds=100):
    return passes(candidates, fits=lambda points: len(points) <= holds, most=most, at_once=at_once)


def of(names: str, shared: str = "x", most: int | None = None) -> list[Candidate]:
    return [Candidate(name, shared, most) for name in names]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["abcdefghi"]),
        ({"most": 4}, ["abcd", "efgh", "i"]),
        ({"holds": 5}, ["abcde", "fghi"]),
        ({"at_once": 2}, ["abcde", "fghi"]),
        ({"at_once": 3}, ["abc", "de", "fghi"]),
        ({"at_once": 20}, list("abcdefghi")),
        ({"holds": 0}, list("abcdefghi")),  # nothing is smaller than one
    ],
)
def test_nine_points_make_as_few_passes_as_may_hold_them(options, expected):
    assert ["".join(one) for one in grouped(of("abcdefghi"), **options)] == expected


def test_points_that_want_other_rows_or_were_split_go_apart():
    found = grouped([*of("ab"), *of("cd", "y"), *of("efg", "x", 2)])
    assert ["".join(one) for one in found] == ["ab", "cd", "ef", "g"]
    assert grouped([]) == []


def values(**changes):
    base = {
        "out": "runs/a", "store": "/s", "sae": {"kind": "topk", "n_latents": 64, "k": 4}, "order": {},
        "train": {"steps": 9}, "wandb": {},
    }  # fmt: skip
    return to_dict(load(TrainJob, base | changes))


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"sae": {"kind": "batchtopk", "n_latents": 32, "k": 2}}, True),
        ({"train": {"steps": 9, "lr": 1e-3, "moments": "int8"}}, True),
        ({"out": "runs/b"}, True),
        ({"seed": 1}, False),  # the seed of the order, too
        ({"train": {"steps": 8}}, False),
        ({"train": {"steps": 9, "batch": 64}}, False),
        ({"store": "/t"}, False),
        ({"order": {"window": 2}}, False),
        ({"mesh": {"feature": 2}}, False),
    ],
)
def test_what_a_pass_shares_is_all_but_the_dictionary(changes, alike):
    assert (shared_by(values(**changes)) == shared_by(values())) is alike
