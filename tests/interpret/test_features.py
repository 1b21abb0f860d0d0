"""Feature data against dense torch, against the feature pages, after stops, and as it is read."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sae_kernels import Active, Selected, packed
from sae_kernels.reference import EMPTY

from sae_dist import checksums
from sae_dist.config import UserError
from sae_dist.interpret import feature_index
from sae_dist.interpret import features as written
from sae_dist.interpret.collect import PagesConfig, collect
from sae_dist.interpret.contexts import choose, shade
from sae_dist.interpret.feature_answers import FeatureAnswers
from sae_dist.interpret.feature_index import SCHEMA as INDEX_SCHEMA
from sae_dist.interpret.feature_table import SCHEMA
from sae_dist.interpret.features import write_features
from sae_dist.interpret.logit_effect import Unembedding
from sae_dist.interpret.read_features import Features, features

ROOT = Path(__file__).parents[2]
N_LATENTS, D_MODEL, DOCS, CONTEXT, K, VOCAB = 600, 8, 500, 20, 3, 50
ROWS = DOCS * CONTEXT
CONFIG = PagesConfig(top_contexts=4, tokens_before=4, tokens_after=2, interval_contexts=2, logits=5)
CATEGORIES = ("code", "prose", "unlabelled")
G = torch.Generator().manual_seed(0)
X, W_DEC = torch.randn(ROWS, D_MODEL, generator=G), torch.randn(N_LATENTS, D_MODEL, generator=G)
W_U, TOKENS = torch.randn(D_MODEL, VOCAB, generator=G), torch.randint(0, VOCAB, (DOCS, CONTEXT), generator=G)
DOC = (torch.arange(ROWS) // CONTEXT + (1 << 63)).view(torch.int64)  # ids whose upper bit is set
POS = torch.arange(ROWS) % CONTEXT


class Stream:
    context = CONTEXT

    def category(self, doc: int) -> str | None:
        return ("code", "prose", None)[(doc - (1 << 63)) % 3]

    def locate(self, doc: int, pos: int) -> tuple[int, int]:
        return doc, pos

    def window(self, doc: int, pos: int, before: int, after: int) -> tuple[list[int], int]:
        first = max(0, pos - before)
        return TOKENS[doc - (1 << 63), first : pos + after + 1].tolist(), pos - first


def encode(x: torch.Tensor) -> Active:
    values, indices = (x @ W_DEC.T).topk(K)
    return packed(Selected(values, torch.where(values > 1, indices, EMPTY)))


def decode(token: int) -> str | bytes:
    return bytes([token + 200]) if token == 7 else f" t{token}"


def rows(size: int = 3000):
    for start in range(0, ROWS, size):
        yield X[start : start + size], DOC[start : start + size], POS[start : start + size]


def write(out: Path, *, encode: Callable = encode, decode: Callable = decode, at_once: int = 256, **about) -> Path:
    return write_features(
        out, rows, encode=encode, W_dec=W_DEC, outputs=Unembedding(W_U, torch.arange(VOCAB)), stream=Stream(),
        decode=decode, vocabulary=range(VOCAB), about=about, config=CONFIG, at_once=at_once,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def found(folder) -> Features:
    return features(folder.parent)


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """Every activation [rows, n_latents]."""
    pre = X @ W_DEC.T
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(K).indices, 1.0) * pre
    return kept.where(kept > 1, 0.0).double()


def test_figures_are_those_of_dense_activations(found, dense):
    columns = {name: np.array(found.read(range(N_LATENTS))[name].to_pylist()) for name in SCHEMA.names[:8]}
    active = dense > 0
    count, total = active.sum(0), dense.sum(0)
    assert found.rows == ROWS and columns["latent"].tolist() == list(range(N_LATENTS))
    assert columns["firings"].tolist() == count.tolist() and 0 in count
    assert columns["density"] == pytest.approx((count / ROWS).numpy())
    assert columns["mean"] == pytest.approx((total / count.clamp(min=1)).numpy())
    squares = (dense**2).sum(0) / count.clamp(min=1)
    assert columns["std"] == pytest.approx(
        (squares - (total / count.clamp(min=1)) ** 2).clamp(min=0).sqrt().numpy(), abs=1e-6
    )
    assert columns["max"] == pytest.approx(dense.amax(0).numpy())
    for latent in range(0, N_LATENTS, 50):
        values, end = dense[active[:, latent], latent].numpy(), columns["histogram_end"][latent]
        assert end / 2 <= values.max(initial=0) < end or not len(values)
        assert columns["histogram"][latent].tolist() == np.histogram(values, 64, (0, end or 1))[0].tolist()


def test_categories_are_those_of_dense_activations(found, dense):
    table = found.read(range(N_LATENTS))
    assert tuple(found.categories) == CATEGORIES
    of_row = [("code", "prose", "unlabelled")[d % 3] for d in (torch.arange(ROWS) // CONTEXT).tolist()]
    assert found.about["category_rows"] == [of_row.count(name) for name in CATEGORIES]
    member = torch.tensor([[name == own for own in of_row] for name in CATEGORIES]).double()
    assert table["category_firings"].to_pylist() == (member @ (dense > 0).double()).T.long().tolist()
    share = (member @ dense) / dense.sum(0).clamp(min=1e-300)
    assert np.array(table["category_share"].to_pylist()) == pytest.approx(share.T.numpy())


def test_logit_effects_are_those_of_the_whole_product(found):
    table, effect = found.read(range(N_LATENTS)), W_DEC @ (W_U - W_U.mean(1, keepdim=True))
    for token, by, best in (
        ("promoted", "promoted_by", effect.topk(5)),
        ("suppressed", "suppressed_by", (-effect).topk(5)),
    ):
        assert table[token].to_pylist() == best.indices.tolist()
        assert np.abs(np.array(table[by].to_pylist())) == pytest.approx(best.values.abs().numpy(), rel=1e-4)


def test_contexts_are_those_of_the_feature_pages_with_the_tokens_of_the_corpus(found, dense):
    whole = collect(rows(), encode, n_latents=N_LATENTS, category=Stream().category, config=CONFIG)
    contexts, intervals = choose(whole, CONFIG)
    shading = shade(rows(), encode, collected=whole, contexts=contexts, config=CONFIG)
    table = found.read(range(N_LATENTS))
    shown = [(latent, one) for latent, own in enumerate(table["contexts"].to_pylist()) for one in own]
    assert len(shown) == len(contexts.slot) > N_LATENTS
    assert np.array(table["interval_edges"].to_pylist()) == pytest.approx(intervals.edges.numpy())
    assert table["interval_firings"].to_pylist() == intervals.firings.tolist()
    for i, (latent, one) in enumerate(shown):
        assert (latent, one["interval"], one["pos"]) == tuple(
            int(c[i]) for c in (contexts.slot, contexts.interval, contexts.pos)
        )
        doc, at = one["doc"] - (1 << 63), one["at"]
        first = one["pos"] - at
        assert one["tokens"] == TOKENS[doc, first : first + len(one["tokens"])].tolist()
        near = dense[doc * CONTEXT + first : doc * CONTEXT + first + len(one["tokens"]), latent]
        assert one["active"] == near.nonzero().squeeze(-1).tolist()
        assert one["activation"] == pytest.approx(near[one["active"]].tolist())
        assert one["value"] == pytest.approx(near[at].item()) and len(one["active"]) == shading.start.diff()[i]
        assert CATEGORIES[one["category"]] == (Stream().category(one["doc"]) or "unlabelled")


def test_latents_are_read_in_any_order_by_row_groups(found, folder):
    wanted = [599, 3, 256, 3, 17]
    table = found.read(wanted, ["latent", "contexts"])
    assert table["latent"].to_pylist() == wanted and table.schema.names == ["latent", "contexts"]
    assert found.read([]).schema == SCHEMA and found.read([1]).schema == SCHEMA
    layout = pq.ParquetFile(folder / "latents-000000256.parquet").metadata
    assert {layout.row_group(i).num_rows for i in range(layout.num_row_groups)} == {16}
    tokens = {one["token"]: (one["text"], one["bytes"]) for one in found.tokens().to_pylist()}
    assert tokens[7] == (None, b"\xcf") and tokens[8] == (" t8", None) and len(tokens) == VOCAB
    table = found.read(range(N_LATENTS), ["firings", "fires_on"])
    assert all((0 < len(own) <= 5) == (n > 0) for n, own in zip(*(column.to_pylist() for column in table), strict=True))


def test_search_finds_what_the_columns_say(found):
    rows = found.read(range(N_LATENTS)).to_pylist()
    fired = [row for row in rows if row["firings"]]

    def numbers(chosen) -> list[int]:
        return [row["latent"] for row in sorted(chosen, key=lambda row: -row["max"])]

    def best(row) -> str:
        return CATEGORIES[int(np.argmax(row["category_share"]))]

    assert found.search("").tolist() == numbers(fired)
    assert found.search('"T8"').tolist() == numbers(row for row in fired if 8 in row["fires_on"])
    eights = {8, 18, 28, 38, 48}
    assert found.search("promotes:8").tolist() == numbers(row for row in fired if eights & set(row["promoted"]))
    assert found.search('cat:"code" "t8"').tolist() == numbers(
        row for row in fired if best(row) == "code" and 8 in row["fires_on"]
    )
    silent = next(row["latent"] for row in rows if not row["firings"])
    assert silent not in found.search(f"{silent}") and fired[5]["latent"] in found.search(f"#{fired[5]['latent']}")
    assert found.search("nowhere").tolist() == [] and found.search("label:x").tolist() == []
    by_number = found.search("cod", sort="latent", descending=False)
    assert by_number.tolist() == [row["latent"] for row in fired if best(row) == "code"]


def test_labels_are_searched_and_shown_where_there_are_some(folder, found, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "features")
    (tmp_path / "labels").mkdir()
    one, other = sorted(found.search("")[:2].tolist())
    labels = pa.table({"latent": pa.array([one, other], pa.int32()), "label": ["<b>Verbs</b>", "dates"]})
    pq.write_table(labels, tmp_path / "labels" / "labels.parquet")
    labelled = features(copy)
    assert labelled.labels([other, one + 1 if one + 1 != other else 0, one]).to_pylist() == [
        "dates",
        None,
        "<b>Verbs</b>",
    ]
    assert labelled.search("label:verb").tolist() == labelled.search("<b>verbs").tolist() == [one]
    assert labelled.search('label:"dates"').tolist() == [other] and labelled.search('label:"date"').tolist() == []
    answers = FeatureAnswers(labelled, "run")
    assert answers.latent(one)["row"] == answers.row(one) and answers.row(one)["label"] == "<b>Verbs</b>"


def test_the_index_is_the_same_in_any_grouping(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "features")
    monkeypatch.setattr(feature_index, "GROUP_LATENTS", 100)
    feature_index.write_index(copy, sorted(path.name for path in copy.glob("latents-*")))
    assert pq.ParquetFile(copy / "index.parquet").metadata.num_row_groups == 6
    assert pq.read_table(copy / "index.parquet").equals(pq.read_table(folder / "index.parquet"))
    (copy / "index.parquet").unlink()
    with pytest.raises(UserError, match="index.parquet is damaged or missing .*; write it again with"):
        features(copy).search("t8")
    about = copy / "features.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match="has format 1, this version reads 2; write it again with"):
        features(copy)


@pytest.mark.parametrize(
    ("latents", "columns", "said"),
    [([600], None, "latent=600 is not there; the dictionary has 0 to 599"), ([-1], None, "latent=-1 is not there"),
     ([1], ["densities"], "column=densities is not known; choose of latent, firings, density")],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(found, latents, columns, said):
    with pytest.raises(UserError, match=re.escape(said)):
        found.read(latents, columns)


def test_missing_and_damaged_data_is_one_line(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"features.json is missing; write it again with `sae-dist pages RUN data=true`"
    ):
        features(tmp_path)
    with pytest.raises(UserError, match="is not on a disk"):
        features("s3://bucket/runs/mine")
    copy = features(shutil.copytree(folder, tmp_path / "copy"))
    path = copy.folder / "latents-000000000.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"latents-000000000.parquet is damaged or missing"):
        copy.read(range(16))
    path.unlink()
    with pytest.raises(UserError, match=r"latents-000000000.parquet is damaged or missing"):
        copy.read([0])
    assert copy.read([300], ["latent"])["latent"].to_pylist() == [300]


class Stop(Exception):
    pass


def after(calls: int, function: Callable) -> Callable:
    """`function`, which stops everything once it was called so often."""
    left = iter(range(calls))

    def counted(value):
        if next(left, None) is None:
            raise Stop
        return function(value)

    return counted


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_work_that_was_stopped_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(written.spool, "PART_ROWS", 4000)  # so that there are parts to keep
    with pytest.raises(Stop):
        write(tmp_path, encode=after(3, encode))
    assert (tmp_path / "features.partial/activations/000000").is_dir() and not (tmp_path / "features").exists()
    with pytest.raises(Stop):
        write(tmp_path, encode=after(2, encode), decode=after(80, decode))  # two batches of four are left
    files = [path.name for path in (tmp_path / "features.partial").glob("latents-*")]
    assert files == ["latents-000000000.parquet"]
    write(tmp_path, encode=after(0, encode), at_once=512)
    assert contents(tmp_path / "features") == contents(folder)
    assert checksums.damage(tmp_path / "features") == "" and not (tmp_path / "features.partial").exists()


def test_work_on_something_else_is_begun_anew(tmp_path):
    with pytest.raises(Stop):
        write(tmp_path, decode=after(80, decode), weights="a")
    with pytest.raises(Stop):
        write(tmp_path, encode=after(0, encode), weights="b")
    assert not list((tmp_path / "features.partial").glob("latents-*"))


def test_the_specification_names_every_column_with_its_type():
    page = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| `([\w.]+)` \| ([\w\[\]]+) \|", page, re.MULTILINE))
    plain = {"float": "float32", "double": "float64"}

    def said(kind: pa.DataType) -> str:
        if pa.types.is_list(kind):
            return f"{said(kind.value_type)}[]"
        return "struct" if pa.types.is_struct(kind) else plain.get(str(kind), str(kind))

    columns = {field.name: said(field.type) for field in SCHEMA}
    index = {field.name: said(field.type) for field in INDEX_SCHEMA}
    assert all(columns.get(name, kind) == kind for name, kind in index.items())
    columns |= {f"contexts.{field.name}": said(field.type) for field in SCHEMA.field("contexts").type.value_type}
    assert named == columns | {"token": "int32", "text": "string", "bytes": "binary", "special": "bool"} | index
