"""Training from a real store: the same result however often it is stopped, live or stored; and it learns."""

import threading
from pathlib import Path

import pytest
import torch

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.sae import dictionary
from sae_dist.sae.config import BatchTopK, SAEConfig, TopK
from sae_dist.shards import consumers, lease, stores
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.shards.records import seal, unseal
from sae_dist.shards.writer import create, write_unit
from sae_dist.train import loop
from sae_dist.train.config import TrainConfig
from sae_dist.train.consumer import consumer_name
from sae_dist.train.members import MAIN, Member
from sae_dist.train.task import Task

N_TRUE, D_MODEL, ROWS, UNITS = 48, 24, 600, 8
CONFIG = TrainConfig(steps=60, batch=64, init_rows=256, checkpoint_every=20, log_every=10, threads=1)
ORDER = OrderConfig(lanes=2, window=2, round_units=2)
SAE = TopK(n_latents=96, k=4, dead_after_tokens=1000)


def rows_of(unit: int) -> torch.Tensor:
    """Sparse sums of 48 fixed directions, far from the origin: what a dictionary is made for."""
    directions = torch.nn.functional.normalize(
        torch.randn(N_TRUE, D_MODEL, generator=torch.Generator().manual_seed(99)), dim=-1
    )
    generator = torch.Generator().manual_seed(unit)
    chosen = torch.rand(ROWS, N_TRUE, generator=generator).topk(3).indices
    strength = 1 + torch.rand(ROWS, 3, generator=generator)
    return 5 + 3 * (strength[..., None] * directions[chosen]).sum(1)


def empty_store(place: Path) -> Store:
    meta = StoreMeta(
        model="made",
        hooks={"x": D_MODEL},
        n_units=UNITS,
        heldout_units=1,
        unit_rows=ROWS,
        slice_rows=128,
        dtype="float32",
    )
    return create(storage.open(str(place)), meta)


def harvest(store: Store, unit: int) -> None:
    ids = torch.arange(ROWS)
    write_unit(store, unit, {"x": rows_of(unit)}, doc=ids, pos=ids, token=ids)


def full_store(place: Path) -> Store:
    store = empty_store(place)
    for unit in range(UNITS):
        harvest(store, unit)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("store"))


def train(
    store: Store, out: Path, *, config: TrainConfig = CONFIG, sae: SAEConfig = SAE, stop=lambda: False,
    set_phase=lambda *_: None, **more,
):  # fmt: skip
    lines: list[tuple[int, dict]] = []
    seed = more.get("seed", 0)
    given = {"seed": seed, "order": ORDER, "members": (Member(MAIN, sae, seed, config.lr),)} | more
    task = Task(store, hooks=Hooks(("x",)), config=config, out=out, **given)
    return loop.train(task, log=lambda *entry: lines.append(entry), stop=stop, set_phase=set_phase), lines


def weights(out: Path) -> bytes:
    return (out / "dictionary" / "dictionary.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(store, out)
    return out


def test_it_learns_what_the_data_are_made_of(store, tmp_path):
    config = TrainConfig(steps=500, batch=128, lr=8e-3, init_rows=512, checkpoint_every=10_000, threads=1)
    _, lines = train(store, tmp_path, config=config, order=OrderConfig(lanes=2))
    assert lines[-1][1]["fvu"] < 0.1 < 0.3 < lines[0][1]["fvu"]
    x = rows_of(UNITS - 1)
    learned = dictionary.load(tmp_path / "dictionary")
    x_hat = learned.decode(learned.encode(x))
    assert float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()) < 0.1


def test_the_same_call_gives_the_same_bits(store, whole, tmp_path):
    train(store, tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_the_share_of_dead_latents_is_null_before_a_latent_can_be_dead(store, tmp_path):
    _, lines = train(store, tmp_path, config=TrainConfig(**{**vars(CONFIG), "steps": 20}))
    assert [line["dead_fraction"] is None for _, line in lines] == [True, False]  # 640 tokens of 1,000, then 1,280


@pytest.mark.parametrize("at", [1, 20, 33])
def test_stopped_and_repeated_is_as_if_never_stopped(store, whole, tmp_path, at):
    seen = iter(range(1, 1000))
    with pytest.raises(Stopped, match=f"step {at} of 60 is saved"):
        train(store, tmp_path, stop=lambda: next(seen) == at)
    _, lines = train(store, tmp_path)
    assert lines[0][0] > at
    assert weights(tmp_path) == weights(whole)


def test_a_damaged_checkpoint_costs_time_and_nothing_else(store, whole, tmp_path):
    train(store, tmp_path)
    newest = max((tmp_path / "checkpoints").glob("step_*")) / "rank00000-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    (tmp_path / "dictionary" / "dictionary.safetensors").unlink()
    _, lines = train(store, tmp_path)
    assert [step for step, _ in lines] == [50, 60]
    assert weights(tmp_path) == weights(whole)


def test_runs_that_share_a_place_for_checkpoints_are_not_one(store, tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "checkpoints": str(tmp_path / "shared")})
    train(store, tmp_path / "a", config=config, provenance={"config_hash": "a"})
    there = sorted((tmp_path / "shared").glob("step_*"))
    with pytest.raises(UserError, match="holds another run's checkpoints; give each run a place of its own"):
        train(store, tmp_path / "b", config=config, provenance={"config_hash": "b"})
    assert sorted((tmp_path / "shared").glob("step_*")) == there and not (tmp_path / "b" / "dictionary").exists()


def spoil(monkeypatch, bad, factor: float = torch.nan):
    """Multiplies the rows of a step where `bad(member's name, step)`; gives what notes the steps, for `at`."""
    step = 0

    def spoilt(learner, config, x, **more):
        return learn(learner, config, x * factor if bad(learner.member.name, step + 1) else x, **more)

    def note(now: int, _: str) -> None:
        nonlocal step
        step = now

    learn = loop.train_step
    monkeypatch.setattr(loop, "train_step", spoilt)
    return note


def test_going_back_finds_what_was_learned_before_the_trouble(store, tmp_path, monkeypatch, caplog):
    """Ten bad steps, a checkpoint due every three, two kept: none within the trouble pushes the good ones out."""
    note = spoil(monkeypatch, lambda _, step: 30 < step <= 40)
    config = TrainConfig(**{**vars(CONFIG), "checkpoint_every": 3, "log_every": 1})
    _, lines = train(store, tmp_path, config=config, set_phase=note)
    fvu = {number: line["fvu"] for number, line in lines}
    assert "going back to step 30" in caplog.text
    assert all(fvu[number] is None for number in range(31, 41))  # a step that was left out explains nothing
    assert fvu[41] < 1.1 * fvu[30]


@pytest.mark.parametrize("stops", [(37,), (43, 46), (51,)])
def test_stopped_anywhere_a_run_goes_back_to_where_the_uninterrupted_one_does(
    store, tmp_path, monkeypatch, caplog, stops
):
    """Bad steps from 42 to 51; stopped before, twice amid them and just after going back."""
    note = spoil(monkeypatch, lambda _, step: 41 < step <= 51)
    train(store, tmp_path / "whole", set_phase=note)
    assert "going back to step 40" in caplog.text
    seen = 0

    def at(now: int, what: str) -> None:
        nonlocal seen
        note(now, what)
        seen = now

    for stop in stops:
        with pytest.raises(Stopped, match=f"step {stop} of 60"):
            train(store, tmp_path / "cut", set_phase=at, stop=lambda stop=stop: seen == stop)
    train(store, tmp_path / "cut", set_phase=at)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_member_goes_back_as_if_it_were_alone(store, tmp_path, monkeypatch):
    """The other one leaves steps out just when the checkpoint is due that this one will go back to."""
    note = spoil(monkeypatch, lambda name, step: 38 < step < 43 if name == "other" else 45 < step <= 55)
    other = Member("other", SAE, seed=7)
    train(store, tmp_path / "alone", set_phase=note)
    train(store, tmp_path / "both", set_phase=note, members=(Member(MAIN, SAE, 0, CONFIG.lr), other))
    assert weights(tmp_path / "both") == weights(tmp_path / "alone")


def test_finite_rows_that_are_enormous_are_not_learned_from(store, tmp_path, monkeypatch, caplog):
    """Their squared gradients would be infinite, and stay so in Adam's second moment: nothing could be saved again."""
    note = spoil(monkeypatch, lambda _, step: step == 31, factor=1e13)
    train(store, tmp_path, set_phase=note)
    assert "is too large: its gradients have no finite squares; the step is left out" in caplog.text
    assert "not saved" not in caplog.text and "going back" not in caplog.text


def test_one_run_at_a_time_works_in_a_place_for_checkpoints(store, tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "checkpoints": str(tmp_path / "shared")})
    with (
        lease.lease(storage.open(tmp_path / "shared"), "runs/other", key="train.checkpoints", folder="lease"),
        pytest.raises(UserError, match=r"^train.checkpoints=\S+ is in use by process \d+ .*\(out=runs/other\)"),
    ):
        train(store, tmp_path / "mine", config=config)


@pytest.mark.parametrize(
    "change", [{"scales": [1.0, "x"]}, {"units_done": -1}, {"guard": {"in_a_row": []}}, {"source": 1}]
)
def test_senseless_facts_of_a_checkpoint_are_one_line(store, tmp_path, change):
    with pytest.raises(Stopped):
        train(store, tmp_path, stop=iter([False, True]).__next__)
    (path,) = (tmp_path / "checkpoints").glob("step_*/checkpoint.json")
    record = {name: value for name, value in unseal(path.read_bytes(), "").items() if name != "digest"}
    path.write_bytes(seal(record | {"facts": record["facts"] | change}))
    with pytest.raises(UserError, match=f"checkpoint {path.parent}: .*; remove that folder to resume from the one"):
        train(store, tmp_path)


def test_what_is_not_finite_when_a_checkpoint_is_due_goes_back_at_once(store, tmp_path, monkeypatch, caplog):
    """An update can overflow where its gradient did not: no loss tells of it, and nothing could be gone back to."""

    def spoilt(learner, config, x, **more):
        learned = learn(learner, config, x, **more)
        if learner.sae.shard.steps == 27 and "going back" not in caplog.text:
            learner.sae.state_dict()["second.W_dec"][0, 0] = torch.inf
        return learned

    learn = loop.train_step
    monkeypatch.setattr(loop, "train_step", spoilt)
    config = TrainConfig(**{**vars(CONFIG), "checkpoint_every": 3, "log_every": 1})
    _, lines = train(store, tmp_path, config=config)
    assert "step 27: a weight or a moment is not finite; going back (roll-back 1)" in caplog.text
    assert "going back to step 24" in caplog.text and "not saved" not in caplog.text
    assert lines[-1][1]["fvu"] < 1.1 * lines[23][1]["fvu"]


def test_live_on_a_growing_store_is_stored(whole, tmp_path):
    growing = empty_store(tmp_path / "store")
    harvest(growing, 0)

    def produce() -> None:
        for unit in range(UNITS - 1, 0, -1):  # the wrong way round: the order must not care
            harvest(growing, unit)

    producer = threading.Thread(target=produce)
    producer.start()
    train(growing, tmp_path / "run", live=True)
    producer.join()
    assert weights(tmp_path / "run") == weights(whole)


def test_checkpoints_go_where_they_are_told_and_say_what_they_cost(store, whole, tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "checkpoints": str(tmp_path / "elsewhere"), "keep_every": 40})
    _, lines = train(store, tmp_path / "run", config=config)
    kept = [path.name[:13] for path in sorted((tmp_path / "elsewhere").glob("step_*"))]
    assert kept == ["step_00000040", "step_00000060"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert lines[-1][1]["checkpoint_seconds"] > 0
    assert weights(tmp_path / "run") == weights(whole)


def test_a_save_that_fails_is_an_alert_and_the_last_one_must_not(store, whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(
        "SAE_DIST_FAULTS", '[{"point": "checkpoint.before_commit", "where": {"step": 20}, "action": "raise"}]'
    )
    train(store, tmp_path / "a")
    assert "ALERT: the checkpoint of step 20 was not saved" in caplog.text
    assert weights(tmp_path / "a") == weights(whole)
    monkeypatch.setenv(
        "SAE_DIST_FAULTS", '[{"point": "checkpoint.before_commit", "where": {"step": 60}, "action": "raise"}]'
    )
    with pytest.raises(UserError, match="checkpoint.before_commit"):
        train(store, tmp_path / "b")


def test_live_training_tells_its_store_how_far_it_is_and_leaves_it_in_the_end(store, tmp_path):
    growing = empty_store(tmp_path / "store")
    for unit in range(UNITS):
        harvest(growing, unit)
    seen = iter(range(1, 1000))
    config = TrainConfig(**{**vars(CONFIG), "checkpoint_every": 2})
    with pytest.raises(Stopped):  # 45 steps of 64 rows: past the first two of three rounds of 1,200
        train(growing, tmp_path / "run", config=config, live=True, stop=lambda: next(seen) == 45)
    (position,) = consumers.positions(growing.storage)
    assert (position.consumer, position.saved) == (consumer_name(tmp_path / "run"), 4)
    assert position.taken >= position.saved
    train(growing, tmp_path / "run", live=True)
    assert consumers.positions(growing.storage) == []


def test_the_seed_changes_the_order_and_the_dictionary(store, whole, tmp_path):
    trained, _ = train(store, tmp_path, seed=1)
    assert weights(tmp_path) != weights(whole)
    again, _ = train(store, whole)
    assert trained.order_hash != again.order_hash


def test_logging_more_often_changes_nothing(store, whole, tmp_path):
    train(store, tmp_path, config=TrainConfig(**{**vars(CONFIG), "log_every": 1, "checkpoint_every": 7}))
    assert weights(tmp_path) == weights(whole)


def test_a_dictionary_that_cannot_work_is_refused_before_anything_is_written(store, tmp_path):
    with pytest.raises(UserError, match="sae.k=30 exceeds d_model=24"):
        train(store, tmp_path / "run", sae=TopK(n_latents=96, k=30))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_stays_infinite_stops_the_run_and_names_the_rate(store, tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "lr": 1e38})
    said = (
        r"not finite, for 10 steps in a row, after 2 roll-backs, up to step \d+; lower train.lr=1e\+38, in another out="
    )
    with pytest.raises(UserError, match=said):
        train(store, tmp_path, config=config)


def test_a_store_that_lost_a_commit_is_not_trained_on(store, tmp_path):
    other = empty_store(tmp_path / "store")
    for unit in range(UNITS):
        harvest(other, unit)
    seen = iter(range(1, 1000))
    with pytest.raises(Stopped):
        train(other, tmp_path / "run", stop=lambda: next(seen) == 5)
    (tmp_path / "store" / "commit" / "00000003.json").unlink()
    with pytest.raises(UserError, match="3"):
        train(stores.open(storage.open(str(tmp_path / "store"))), tmp_path / "run")


BATCHES = BatchTopK(n_latents=96, k=4, dead_after_tokens=1000)


@pytest.mark.slow
def test_batchtopk_learns_and_its_threshold_gives_k_latents_a_row(store, tmp_path):
    config = TrainConfig(steps=500, batch=128, lr=8e-3, init_rows=512, checkpoint_every=10_000, threads=1)
    _, lines = train(store, tmp_path, config=config, order=OrderConfig(lanes=2), sae=BATCHES)
    assert lines[-1][1]["fvu"] < 0.1 < 0.3 < lines[0][1]["fvu"]
    assert {line["l0"] for _, line in lines} == {4.0}
    x, learned = rows_of(UNITS - 1), dictionary.load(tmp_path / "dictionary")
    assert learned.info["variant"] == "batchtopk" and learned.threshold is not None
    assert float(learned.threshold.max()) == pytest.approx(lines[-1][1]["threshold"], rel=1e-6)
    active = learned.encode(x)
    per_row = active.offsets.diff().double()
    assert float(per_row.mean()) == pytest.approx(4, rel=0.1) and float(per_row.std()) > 0.3
    assert float((x - learned.decode(active)).square().sum() / (x - x.mean(0)).square().sum()) < 0.1


@pytest.mark.parametrize("at", [20, 33])
def test_batchtopk_stopped_and_repeated_is_as_if_never_stopped(store, tmp_path, at):
    train(store, tmp_path / "whole", sae=BATCHES)
    seen = iter(range(1, 1000))
    with pytest.raises(Stopped, match=f"step {at} of 60 is saved"):
        train(store, tmp_path / "run", sae=BATCHES, stop=lambda: next(seen) == at)
    train(store, tmp_path / "run", sae=BATCHES)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
