"""Several dictionaries in one pass: each is what training it alone gives, and the rows are read once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.sae.config import TopK
from sae_dist.shards.reader import Store
from sae_dist.train import loop
from sae_dist.train.guard import GuardConfig
from sae_dist.train.members import MAIN, Member, members
from sae_dist.train.schedule import base_lr
from tests.train.test_loop import CONFIG, SAE, full_store, train

MORE = (
    {"k": 8},
    {"n_latents": 160, "seed": 1, "name": "wide"},
    {"lr": 1e-3, "k_aux": 16},
    {"parameters": "bfloat16_stochastic", "moments": "int8"},
)
GIVEN = members(MORE, sae=SAE, seed=0)
FIGURES = ("fvu", "l0", "dead_fraction", "lr", "skipped_steps", "roll_backs")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("members")


@pytest.fixture(scope="module")
def store(place) -> Store:
    return full_store(place / "store")


@pytest.fixture(scope="module")
def together(store, place):
    """All members in one pass: where they are, and the lines of its log."""
    return place / "together", train(store, place / "together", members=GIVEN)[1]


def weights(member: Member, out: Path) -> bytes:
    return (member.folder(out) / "dictionary.safetensors").read_bytes()


def by_itself(member: Member) -> Member:
    return member._replace(name=MAIN)


@pytest.mark.parametrize("member", GIVEN, ids=lambda member: member.name)
def test_a_member_is_the_dictionary_that_training_it_alone_gives(store, together, tmp_path, member):
    out, lines = together
    alone = by_itself(member)
    _, own_lines = train(store, tmp_path, members=[alone])
    assert weights(member, out) == weights(alone, tmp_path)
    for (step, line), (own_step, own) in zip(lines, own_lines, strict=True):
        assert (step, line["order_hash"]) == (own_step, own["order_hash"])
        assert [line[member.prefix + name] for name in FIGURES] == [own[name] for name in FIGURES]


def test_members_differ(together):
    assert len({weights(member, together[0]) for member in GIVEN}) == len(GIVEN)


@pytest.mark.parametrize("at", [20, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 33))])
def test_stopped_and_repeated_all_are_as_if_never_stopped(store, together, tmp_path, at):
    seen = iter(range(1, 1000))
    with pytest.raises(Stopped, match=f"step {at} of 60 is saved"):
        train(store, tmp_path, members=GIVEN, stop=lambda: next(seen) == at)
    train(store, tmp_path, members=GIVEN)
    for member in GIVEN:
        assert weights(member, tmp_path) == weights(member, together[0])


def test_a_damaged_checkpoint_leads_all_members_back_to_the_one_before(store, together, tmp_path):
    seen = iter(range(1, 1000))
    with pytest.raises(Stopped):
        train(store, tmp_path, members=GIVEN, stop=lambda: next(seen) == 47)
    newest = max((tmp_path / "checkpoints").glob("step_*")) / "rank00000-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    _, lines = train(store, tmp_path, members=GIVEN)
    assert [step for step, _ in lines] == [50, 60]
    for member in GIVEN:
        assert weights(member, tmp_path) == weights(member, together[0])


class Counted:
    """A storage that nobody can map into memory, and how many bytes of rows were read from it."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.bytes = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def local_path(self, key: str) -> None:
        del key

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Any:
        data = self._inner.read(key, start, length)
        self.bytes += len(data) if key.startswith("data/") else 0
        return data


def test_the_rows_are_read_once_for_all_members(place, store, tmp_path):
    read = []
    for number in (1, len(GIVEN)):
        counted: Any = Counted(storage.open(str(place / "store")))
        train(Store(counted, store.meta), tmp_path / str(number), members=GIVEN[:number])
        read.append(counted.bytes)
    assert read[0] == read[1] > 60 * 64 * 24 * 4


def spoil(monkeypatch, name: str, steps: range) -> Any:
    """From now on the member's decoder is not a number before each of these steps; to be given as `at`."""
    learn, now = loop.train_step, 0

    def spoiled(learner: Any, *given: Any, **more: Any) -> Any:
        if learner.member.name == name and now in steps:
            learner.sae.shard.W_dec[0] = torch.nan
        return learn(learner, *given, **more)

    def at(step: int, _: str) -> None:
        nonlocal now
        now = step

    monkeypatch.setattr(loop, "train_step", spoiled)
    return at


def test_only_the_member_that_is_not_finite_skips_and_goes_back(store, together, tmp_path, monkeypatch, caplog):
    config = dataclasses.replace(CONFIG, guard=GuardConfig(max_skipped=3, max_roll_backs=1))
    _, healthy, *others = GIVEN
    with monkeypatch.context() as patch:
        _, lines = train(
            store, tmp_path / "a", config=config, members=GIVEN, set_phase=spoil(patch, healthy.name, range(25, 28))
        )
    with monkeypatch.context() as patch:
        alone = [by_itself(healthy)]
        train(store, tmp_path / "b", config=config, members=alone, set_phase=spoil(patch, MAIN, range(25, 28)))
    assert weights(healthy, tmp_path / "a") == weights(by_itself(healthy), tmp_path / "b")
    for member in (GIVEN[0], *others):
        assert weights(member, tmp_path / "a") == weights(member, together[0])
    assert "ALERT: k8: step 28: the loss or a gradient is not finite, for 3 steps in a row; going back" in caplog.text
    alerts = {step: [key for key in line if key.endswith("alert")] for step, line in lines}
    assert {step: keys for step, keys in alerts.items() if keys} == {26: ["k8/alert"], 28: ["k8/alert"]}
    last = lines[-1][1]
    assert (last["k8/skipped_steps"], last["k8/roll_backs"], last["skipped_steps"], last["roll_backs"]) == (3, 1, 0, 0)


def test_broken_off_after_a_roll_back_it_goes_back_to_the_same_again(store, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, guard=GuardConfig(max_skipped=3, max_roll_backs=1))

    def go(out: Path) -> None:
        with monkeypatch.context() as patch:
            train(store, out, config=config, members=GIVEN[:2], set_phase=spoil(patch, "k8", range(25, 28)))

    go(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setenv("SAE_DIST_FAULTS", '[{"point": "train.step", "where": {"step": 35}, "action": "raise"}]')
        with pytest.raises(OSError, match="train.step"):
            go(tmp_path / "broken")
    assert [path.name[:13] for path in (tmp_path / "broken" / "checkpoints").glob("step_*")] == ["step_00000020"]
    go(tmp_path / "broken")
    for member in GIVEN[:2]:
        assert weights(member, tmp_path / "broken") == weights(member, tmp_path / "whole")


def test_the_guard_names_the_member_that_it_gives_up(store, tmp_path):
    wild = members([{"lr": 1e38, "name": "wild"}], sae=SAE, seed=0)
    with pytest.raises(
        UserError, match=r"^wild: .*after 2 roll-backs, up to step \d+; lower its lr=1e\+38, in another"
    ):
        train(store, tmp_path, members=wild)


def test_other_members_than_those_of_the_checkpoints_are_refused(store, together):
    with pytest.raises(UserError, match="holds 5 dictionaries, of which 1 are among the 1 of this training"):
        train(store, together[0], members=GIVEN[:1])


def test_a_member_that_cannot_work_is_named_before_anything_is_written(store, tmp_path):
    with pytest.raises(UserError, match="^more_dictionaries=k30: sae.k=30 exceeds d_model=24"):
        train(store, tmp_path / "run", members=members([{"k": 30}], sae=SAE, seed=0))
    assert not (tmp_path / "run").exists()


def test_an_entry_changes_what_it_says_and_nothing_else():
    assert GIVEN[0] == Member(MAIN, SAE, 0, None)
    assert GIVEN[1] == Member("k8", dataclasses.replace(SAE, k=8), 0, None)
    assert GIVEN[2] == Member("wide", dataclasses.replace(SAE, n_latents=160), 1, None)
    assert GIVEN[3] == Member("lr0.001-k_aux16", dataclasses.replace(SAE, k_aux=16), 0, 1e-3)
    assert GIVEN[4] == Member(GIVEN[4].name, SAE, 0, None, "bfloat16_stochastic", "int8")
    inherited, law = members([{"k": 8}, {"lr": None}], sae=SAE, seed=3, lr=0.1)[1:]
    assert (inherited.lr, inherited.seed) == (0.1, 3)
    compact, plain = members([{"k": 8}, {"moments": "float32"}], sae=SAE, seed=0, moments="factored")[1:]
    assert (compact.state.moments, plain.state.plain) == ("factored", True)
    assert law.peak_lr(10**6) == base_lr(96, 10**6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"n_latent": 8}], "more_dictionaries.0: unknown key n_latent=8; remove it"),
        ([{"k": 8}, {"k": "many"}], "more_dictionaries.1: k='many': give a whole number"),
        ([{"moments": "int4"}], "more_dictionaries.0: moments='int4': give 'float32', 'int8' or 'factored'"),
        ([{"k": 97}], "more_dictionaries.0: k=97 exceeds n_latents=96"),
        ([{"seed": "x"}], "more_dictionaries.0: seed='x'"),
        ([{"lr": -1}], "more_dictionaries.0: lr=-1: give more than 0"),
        ([{"k": 8}, {"k": 8}], "more_dictionaries.1: there is another dictionary named k8; give it a name="),
        ([{"k": 8}, {"k": 8, "name": "b"}], "more_dictionaries.1={'k': 8, 'name': 'b'} is the same dictionary as k8"),
        ([{"k": 4}], "more_dictionaries.0={'k': 4} is the same dictionary as main"),
        ([{"k": 8, "name": "main"}], "more_dictionaries.0: there is another dictionary named main"),
        ([{"k": 8, "name": "a/b"}], "more_dictionaries.0: name='a/b'"),
        ([{"name": "b"}], "more_dictionaries.0={'name': 'b'} changes nothing; give it n_latents, k, seed, lr"),
    ],
)
def test_a_wrong_entry_is_one_line_that_names_it(given, said):
    with pytest.raises(UserError) as refused:
        members(given, sae=TopK(n_latents=96, k=4), seed=0)
    assert said in str(refused.value)
