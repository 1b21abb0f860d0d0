"""delphi's cache of a run, read back as delphi reads it, against the dictionary on the stored rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sae_dist import dashboards, storage
from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.shards import stores
from sae_dist.shards.reader import heldout
from sae_dist.text.stream import TokenStream
from tests.steer.worlds import N, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("cached") / "run")


def test_every_activation_of_held_out_rows_is_at_its_place(run, tmp_path, capsys):
    assert main(["export", str(run), "format=delphi", f"to={tmp_path}"]) == 0
    assert f"6 files in {tmp_path}" in capsys.readouterr().out
    folder = tmp_path / "layers.1"
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == 64 and config["model_name"] == "tiny-llama" and config["n_splits"] == 5
    assert config["dataset_repo"] == "text.jsonl"  # the run has its path
    files = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    spans = [tuple(map(int, path.stem.split("_"))) for path in files]
    assert spans[0][0] == 0 and spans[-1][1] == N - 1
    assert all(one[1] + 1 == other[0] for one, other in zip(spans, spans[1:], strict=False))
    found = torch.zeros(config["n_tokens"] // 64, 64, N)
    for path, (first, last) in zip(files, spans, strict=True):
        stored = load_file(path)
        assert stored["locations"].dtype == np.uint16 and stored["activations"].dtype == np.float16
        at = stored["locations"].astype(np.int64)
        at[:, 2] += first  # as delphi's loader does
        assert at[:, 2].max(initial=first) <= last
        found[tuple(at.T)] = torch.from_numpy(stored["activations"].astype(np.float32))
    tokens = load_file(files[0])["tokens"].astype(np.int64)
    own, store = dictionary_file.load(run / "dictionary"), stores.open(storage.open(str(run / "store")))
    rows = [part for part in heldout(store, "resid_post.1", 512)]
    active = own.encode(torch.cat([part.x.float() for part in rows]))
    (folder,) = run.glob("text/*/heldout")
    stream, expected = TokenStream(folder), torch.zeros_like(found)
    places = [stream.locate(int(doc), int(pos)) for part in rows for doc, pos in zip(part.doc, part.pos, strict=True)]
    for row, latent, value in zip(active.rows.tolist(), active.indices.tolist(), active.values.half(), strict=True):
        expected[(*places[row], latent)] = value
    torch.testing.assert_close(found, expected)
    of_rows = np.concatenate([part.token for part in rows])
    np.testing.assert_array_equal(tokens[tuple(np.array(places).T)], of_rows)
    assert not found[:, 0].any()  # the first position of a sequence is no row


def test_what_it_cannot_be_made_of_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("dictionary", "store", "config.yaml"):
        (tmp_path / "run" / name).symlink_to(run / name)
    with pytest.raises(UserError, match="has 0 held-out texts"):
        list(dashboards.export(tmp_path / "run", tmp_path / "to", format="delphi"))
    (folder,) = run.glob("text/*/heldout")
    with pytest.raises(UserError, match="document 1 is not in .*; the activations were made from another text"):
        TokenStream(folder).places(np.array([1], np.uint64), np.array([0], np.uint32))
    with pytest.raises(UserError, match="set_name=mine means nothing to format=delphi"):
        list(dashboards.export(run, tmp_path / "to", format="delphi", set_name="mine"))
