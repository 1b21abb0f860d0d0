"""A state that is stored compactly: what checkpoints hold of it, that nothing of it is lost, and what is refused."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.config import Stopped, UserError
from sae_dist.sae.config import BatchTopK, TopK
from sae_dist.shards.reader import Store
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import OwnedRows
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.members import MAIN, Member, split_name
from sae_dist.train.parallel.mesh import Axis, Mesh
from sae_dist.train.state import from_checkpoint, owned_rows, to_checkpoint
from tests.train.test_loop import CONFIG, D_MODEL, SAE, full_store, train, weights

OPTIONS = list(product(("float32", "bfloat16_stochastic"), ("float32", "int8", "factored")))
COMPACT = OPTIONS[1:]
SHORT = dataclasses.replace(CONFIG, steps=24, checkpoint_every=10)
MEMBERS = [Member(MAIN, SAE, 0), *(Member(f"{p}-{m}", SAE, 0, None, p, m) for p, m in COMPACT)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """All six in one pass, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(store, out, config=SHORT, members=MEMBERS)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {member.name: (member.folder(out) / "dictionary.safetensors").read_bytes() for member in MEMBERS}


def newest(out: Path) -> checkpoint.Checkpoint:
    return checkpoint.read(storage.open(out / "checkpoints"), newest_folder(out))


def tensor(saved: checkpoint.Checkpoint, name: str) -> torch.Tensor:
    found = saved.tensors[name]
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("at", [10, 17])
def test_stopped_and_repeated_every_state_is_as_if_never_stopped(store, whole, tmp_path, at):
    seen = iter(range(1, 1000))
    with pytest.raises(Stopped, match=f"step {at} of 24 is saved"):
        train(store, tmp_path, config=SHORT, members=MEMBERS, stop=lambda: next(seen) == at)
    train(store, tmp_path, config=SHORT, members=MEMBERS)
    assert files(tmp_path) == files(whole)
    assert len(set(files(whole).values())) == len(MEMBERS)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_checkpoint_holds_what_is_stored_and_the_dictionary_is_its_weights_in_fp32(whole, member):
    saved = newest(whole)
    own = {split_name(name)[1]: tensor(saved, name) for name in saved.tensors if split_name(name)[0] == member.prefix}
    for name in ("W_enc", "W_dec"):
        stored = torch.float32 if member.parameters == "float32" else torch.bfloat16
        assert (own[name].shape, own[name].dtype) == ((SAE.n_latents, D_MODEL), stored)
        moments = {n.partition(".")[0]: (tuple(t.shape), t.dtype) for n, t in own.items() if n.endswith(f".{name}")}
        coded = ((SAE.n_latents, D_MODEL), torch.uint8), ((SAE.n_latents, 1), torch.float32)  # codes, a scale a row
        by_hand = {
            "float32": dict.fromkeys(("first", "second"), ((SAE.n_latents, D_MODEL), torch.float32)),
            "int8": dict(zip(("first", "first_scale", "second", "second_scale"), coded * 2, strict=True)),
            "factored": dict(zip(("first", "first_scale"), coded, strict=True))
            | {"second_row": ((SAE.n_latents,), torch.float32), "second_column": ((D_MODEL,), torch.float32)},
        }
        assert moments == by_hand[member.moments]
    written = load_file(member.folder(whole) / "dictionary.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float32}
    assert torch.equal(written["W_dec"], own["W_dec"].float())
    assert torch.equal(written["W_enc"].T, own["W_enc"].float())


@pytest.mark.parametrize("feature", [1, 2, 5])
def test_every_rank_of_any_mesh_takes_over_its_latents_bit_for_bit(whole, feature):
    saved = newest(whole)
    parts: list[dict[str, Any]] = []
    for rank in range(feature):
        mesh = dataclasses.replace(Mesh.single(), feature=Axis(rank, feature))
        here = checkpoint.read(storage.open(whole / "checkpoints"), newest_folder(whole), owned_rows(mesh, MEMBERS))
        parts.append(dict(to_checkpoint(from_checkpoint(here, MEMBERS, SHORT, mesh)).tensors))
    for name, there in saved.tensors.items():
        assert isinstance(there, torch.Tensor)
        rows = [part[name] for part in parts]
        if isinstance(rows[0], OwnedRows):
            assert [row.start for row in rows] == [rank * -(-SAE.n_latents // feature) for rank in range(feature)]
            assert torch.equal(torch.cat([row.local for row in rows]), there)
        else:
            assert all(torch.equal(row, there) for row in rows)
            assert name.rpartition("/")[2] in ("steps", "b_dec", "first.b_dec", "second.b_dec") or "column" in name


def newest_folder(out: Path) -> str:
    return folders(storage.open(out / "checkpoints"))[0]


def test_a_state_that_is_rounded_at_random_is_so_by_the_seed_of_its_dictionary(store, tmp_path):
    """Two runs of one seed are equal; the seed of the order is another thing."""
    compact = Member(MAIN, SAE, 0, None, "bfloat16_stochastic", "int8")
    other = compact._replace(name="other", seed=1)
    train(store, tmp_path / "a", config=SHORT, members=[compact, other])
    train(store, tmp_path / "b", config=SHORT, members=[compact])
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert (other.folder(tmp_path / "a") / "dictionary.safetensors").read_bytes() != weights(tmp_path / "a")


def test_the_run_says_where_plain_torch_computes_a_compact_state(store, tmp_path, caplog):
    """Here because of fp32 products, for which there is no kernel."""
    config = dataclasses.replace(SHORT, steps=2, product="float32")
    train(store, tmp_path, config=config, members=[MEMBERS[0], MEMBERS[1]])
    said = [record.getMessage() for record in caplog.records if "plain torch" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("float32-int8: parameters=float32 moments=int8: computed by plain torch")


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (Member(MAIN, SAE, 0), "train.parameters=bfloat16_stochastic there, float32 here, train.moments=int8 there,"),
        (Member(MAIN, SAE, 0, None, "bfloat16_stochastic", "factored"), "train.moments=int8 there, factored here"),
        (Member(MAIN, TopK(n_latents=60, k=4), 0, None, "bfloat16_stochastic", "int8"), "n_latents=96 there, 60 here"),
        (Member(MAIN, BatchTopK(n_latents=96, k=4), 0, None, "bfloat16_stochastic", "int8"), "kind=topk there,"),
    ],
)
def test_a_checkpoint_of_another_state_is_refused_with_what_differs(store, tmp_path, member, said):
    seen = iter(range(1, 1000))
    compact = Member(MAIN, SAE, 0, None, "bfloat16_stochastic", "int8")
    with pytest.raises(Stopped):
        train(store, tmp_path, config=SHORT, members=[compact], stop=lambda: next(seen) == 3)
    with pytest.raises(UserError, match=r"^the checkpoint of step \d holds another dictionary ") as refused:
        train(store, tmp_path, config=SHORT, members=[member])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_keys_reach_the_training_and_a_wrong_one_or_another_checkpoint_is_one_line(store, tmp_path, capsys):
    keys = [
        "train", f"store={store.storage.uri}", "sae.n_latents=96", "sae.k=4", "train.steps=4", "train.batch=64",
        "train.init_rows=256", "wandb.mode=disabled",
    ]  # fmt: skip
    compact = ["train.parameters=bfloat16_stochastic", "train.moments=factored"]
    assert main([*keys, *compact, f"out={tmp_path}/a"]) == 0
    assert tensor(newest(tmp_path / "a"), "W_dec").dtype == torch.bfloat16
    assert main([*keys, "train.moments=int4", f"out={tmp_path}/b"]) == 2
    assert main([*keys, f"out={tmp_path}/c", f"train.checkpoints={tmp_path}/a/checkpoints"]) == 2
    assert main([*keys, f"out={tmp_path}/a"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "train.moments='int4': give 'float32', 'int8' or 'factored'" in errors[0]
    assert f"train.checkpoints={tmp_path}/a/checkpoints holds another run's checkpoints" in errors[1]
    assert "train.moments=factored there, float32 here" in errors[2]
