"""Token streams against ids that were worked out by hand; builds that are repeated, raced, broken and killed."""

import logging
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_dist.cli.compose import compose
from sae_dist.config import UserError, load
from sae_dist.text import document, files, stream_writer
from sae_dist.text import tokenize as module
from sae_dist.text.corpus import TextConfig, documents
from sae_dist.text.document import Document, doc_id
from sae_dist.text.files import FilesText
from sae_dist.text.stream import TokenStream
from sae_dist.text.tokenize import tokenize, tokenizer_fingerprint


def some_texts(n=60, seed=0):
    generator = random.Random(seed)
    return [" ".join(str(generator.randrange(1000)) for _ in range(generator.randrange(1, 30))) for _ in range(n)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def texts_of(stream, config) -> set[str]:
    by_source = {d.source: d.text for d in documents(config)}
    return {by_source[source] for source in stream.documents["source"].to_pylist()}


@pytest.fixture
def build(tmp_path, numbers):
    def run(config, tokenizer=None, **options):
        options = {
            "context": 4,
            "n_tokens": 400,
            "heldout_fraction": 0.25,
            "seed": 0,
            "folder": tmp_path / "t",
        } | options
        return tokenize(config, tokenizer or numbers(), **options)

    return run


def test_one_document_by_hand(write_jsonl, build, numbers):
    config = write_jsonl(["0 1 2 3 4 5"])
    stream = build(config, context=3, n_tokens=7, heldout_fraction=0).train
    assert stream.n_sequences == 2
    found = stream.sequences(np.array([1, 0]))
    assert found.tokens.tolist() == [[4, 5, 6], [1, 2, 3]]  # BOS is 1, the word "n" is n + 2
    assert found.pos.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert (found.tokens.dtype, found.doc.dtype, found.pos.dtype) == (np.int64, np.uint64, np.uint32)
    assert (stream.tokens.dtype, stream.starts.dtype, stream.starts.tolist()) == (np.int32, np.int64, [0, 6])
    (doc,) = set(found.doc.ravel().tolist())
    assert (stream.category(doc), stream.source(doc)) == ("k2", "text.jsonl:1")
    assert stream.locate(doc, 4) == (1, 1)
    window = stream.window(doc, 4, before=2, after=9)
    assert (window.tokens.tolist(), window.at) == ([3, 4, 5, 6], 2)


@pytest.mark.parametrize("bos, eos, opening", [(1, 7, [1]), (None, 7, [7]), (None, None, []), (0, None, [0])])
def test_documents_open_with_bos_else_eos_else_nothing(write_jsonl, build, numbers, bos, eos, opening):
    tokenizer = numbers(bos=bos, eos=eos)
    texts = ["10 11 12", "20", "30 31"]
    n = sum(len(t.split()) + len(opening) for t in texts)
    stream = build(write_jsonl(texts), tokenizer, context=1, n_tokens=n, heldout_fraction=0).train
    spans = [stream.tokens[a:b].tolist() for a, b in zip(stream.starts, stream.starts[1:], strict=False)]
    assert sorted(spans) == sorted([*opening, *(int(w) + 2 for w in t.split())] for t in texts)


def test_every_document_is_whole_and_on_one_side_and_none_is_twice(write_jsonl, build):
    texts = some_texts()
    config = write_jsonl(texts + texts[::2])
    split = build(config, n_tokens=640)
    sides = [texts_of(stream, config) for stream in split]
    assert not sides[0] & sides[1] and sides[0] and sides[1]
    for stream in split:
        ids = stream.doc_ids.tolist()
        assert len(set(ids)) == len(ids)
        by_source = {d.source: d.text for d in documents(config)}
        spans = zip(stream.starts, stream.starts[1:], strict=False)
        for (a, b), source in zip(spans, stream.documents["source"].to_pylist(), strict=True):
            whole = [1, *(int(word) + 2 for word in by_source[source].split())]
            assert stream.tokens[a:b].tolist() == (whole if b < len(stream.tokens) else whole[: b - a])
        assert stream.starts[-1] == len(stream.tokens) == stream.n_sequences * stream.context


def test_the_side_of_a_text_depends_on_nothing_but_the_text(write_jsonl, build):
    texts = some_texts(200)
    one, other = write_jsonl(texts), write_jsonl(texts[::-1] + texts[50:90] + some_texts(40, seed=1), "other.jsonl")
    a = build(one, n_tokens=2000)
    b = build(other, n_tokens=2000, seed=9)
    for first, second in ((a.train, b.heldout), (b.train, a.heldout)):
        assert not set(first.doc_ids.tolist()) & set(second.doc_ids.tolist())


def test_copies_of_a_document_are_one_document(write_jsonl, build):
    texts = some_texts(100)
    config = write_jsonl([*texts, *(text.replace(" ", "\n ") + "\n" for text in texts)])
    split = build(config, n_tokens=1000, heldout_fraction=0.3)
    assert split.counts["repeated"] > 0
    for stream in split:
        assert len(set(stream.doc_ids.tolist())) == len(stream.doc_ids)
    again = build(write_jsonl([f"\n{text}\n" for text in texts], "copies.jsonl"), n_tokens=1000, heldout_fraction=0.3)
    for one, other in ((split.train, again.heldout), (again.train, split.heldout)):
        assert not set(one.doc_ids.tolist()) & set(other.doc_ids.tolist())


def test_all_pieces_of_a_document_are_on_one_side(tmp_path, write_jsonl, build, monkeypatch):
    for owner in (document, files):
        monkeypatch.setattr(owner, "MAX_CHARS", 40)
    texts = some_texts(300)
    (tmp_path / "books").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "books" / f"{i}.txt").write_text(text)
    for config in (write_jsonl(texts), FilesText(path=str(tmp_path / "books"))):
        split = build(config, n_tokens=1600, heldout_fraction=0.4)
        train, heldout = ({s.partition("[")[0] for s in side.documents["source"].to_pylist()} for side in split)
        assert train and heldout and not train & heldout
        sources = split.train.documents["source"].to_pylist()
        assert len({s.partition("[")[0] for s in sources}) < len(sources)  # some are in pieces


def test_a_larger_heldout_share_keeps_what_a_smaller_one_held_out(write_jsonl, build):
    config = write_jsonl(some_texts(300))
    few = set(build(config, n_tokens=1200, heldout_fraction=0.2).heldout.doc_ids.tolist())
    many = set(build(config, n_tokens=1200, heldout_fraction=0.5).train.doc_ids.tolist())
    assert few and not few & many


def test_the_shares_are_the_ones_asked_for(write_jsonl, build):
    split = build(write_jsonl(some_texts(300)), n_tokens=1003, context=4, heldout_fraction=0.1)
    assert (split.train.n_sequences, split.heldout.n_sequences) == (225, 25)  # 250 whole sequences in 1003 tokens


@given(data=st.data(), context=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_locate_and_window_invert_sequences(tmp_path_factory, numbers, data, context):
    words = st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=False)
    texts = data.draw(st.lists(words.map(lambda w: " ".join(map(str, w))), min_size=2, max_size=8, unique=True))
    folder = tmp_path_factory.mktemp("t")
    path = folder / "x.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    config = module.corpus.JsonlText(path=str(path))
    total = sum(1 + len(text.split()) for text in texts)
    if total < context:
        return
    stream = tokenize(
        config, numbers(), context=context, n_tokens=total, heldout_fraction=0, seed=1, folder=folder / "t"
    ).train
    found = stream.sequences(np.arange(stream.n_sequences))
    for s in range(stream.n_sequences):
        for o in range(context):
            doc, pos = int(found.doc[s, o]), int(found.pos[s, o])
            assert stream.locate(doc, pos) == (s, o)
            before, after = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
            window = stream.window(doc, pos, before, after)
            assert window.tokens[window.at] == found.tokens[s, o]
            text = next(t for t in texts if doc_id(t) == doc)
            whole = [1, *(int(word) + 2 for word in text.split())]
            kept = whole[: len(whole) if doc != int(stream.doc_ids[-1]) else int(np.diff(stream.starts)[-1])]
            assert window.tokens.tolist() == kept[max(0, pos - before) : pos + after + 1]


def test_a_foreign_document_and_a_position_past_the_end_are_refused(write_jsonl, build):
    stream = build(write_jsonl(["0 1 2"]), n_tokens=4, heldout_fraction=0).train
    with pytest.raises(UserError, match="document 5 is not in"):
        stream.locate(5, 0)
    with pytest.raises(IndexError, match="has 4 tokens"):
        stream.locate(int(stream.doc_ids[0]), 4)
    with pytest.raises(IndexError, match="there are 1"):
        stream.sequences(np.array([1]))


def test_two_builds_are_byte_identical_and_another_seed_is_another_order(write_jsonl, build, tmp_path):
    config = write_jsonl(some_texts())
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build(config, folder=tmp_path / name, seed=seed)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    orders = [TokenStream(next((tmp_path / n).glob("*/train"))).doc_ids.tolist() for n in "ac"]
    assert orders[0] != orders[1]


def test_a_build_is_reused_until_something_that_matters_changes(write_jsonl, build, numbers):
    texts = some_texts()
    config = write_jsonl(texts)
    first = build(config)
    again = numbers()
    assert build(config, again).train.folder == first.train.folder
    assert again.encoded == module.PROBES  # asked for its fingerprint only
    folders = {first.train.folder}
    for options in ({"seed": 1}, {"context": 5}, {"n_tokens": 396}, {"heldout_fraction": 0.2}):
        folders.add(build(config, **options).train.folder)
    folders.add(build(config, numbers(bos=3)).train.folder)
    write_jsonl([*texts, "1 2 3"])
    folders.add(build(config).train.folder)
    assert len(folders) == 7


def test_tokenizers_that_differ_only_in_what_they_do_have_other_fingerprints(numbers):
    class Otherwise(numbers):
        def __call__(self, text, *, add_special_tokens, split_special_tokens):
            return {"input_ids": [[0] * len(t) for t in text]}

    assert tokenizer_fingerprint(numbers()) == tokenizer_fingerprint(numbers())
    assert tokenizer_fingerprint(numbers()) != tokenizer_fingerprint(Otherwise())
    assert tokenizer_fingerprint(numbers()) != tokenizer_fingerprint(numbers(bos=None))


def test_a_text_that_is_too_short_is_said_with_a_number_that_works(write_jsonl, build):
    texts = some_texts(1000)
    config, held_out = write_jsonl(texts), 400
    with pytest.raises(UserError, match="the text is too short: .* in 1,000 documents of") as error:
        build(config, n_tokens=100_000, heldout_fraction=held_out / 100_000)
    enough = int(re.search(r"harvest\.tokens=(\d+)", str(error.value))[1]) + held_out
    split = build(config, n_tokens=enough, heldout_fraction=held_out / enough)
    assert split.heldout.n_sequences == 100
    assert enough > 0.8 * sum(1 + len(text.split()) for text in texts)
    with pytest.raises(UserError, match="characters; give more text"):
        build(write_jsonl(["1 2"], "short.jsonl"), n_tokens=4000, heldout_fraction=0.9)


def test_too_few_documents_for_two_sides_are_said_to_be_that(tmp_path, write_jsonl, build):
    book = " ".join(["7"] * 5000)
    with pytest.raises(UserError, match=r"heldout_tokens.*its one document cannot be on both sides.*text\.separator"):
        build(write_jsonl([book]), n_tokens=400)
    (tmp_path / "book.txt").write_text("\n\n".join(some_texts(100)))
    with pytest.raises(UserError) as error:
        build(load(TextConfig, compose("run", [f"text={tmp_path / 'book.txt'}"])["text"]))
    cure = re.search(r"'(text.separator=.*)'", str(error.value))[1]
    assert build(load(TextConfig, compose("run", [f"text={tmp_path / 'book.txt'}", cure])["text"])).heldout.n_sequences
    books = [f"{book} {i}" for i in range(3)]
    for share in (0.001, 0.999):  # of three documents none is on the small side, whichever that is
        with pytest.raises(UserError, match="each of its 3 documents is on one side as a whole") as error:
            build(write_jsonl(books), n_tokens=4000, heldout_fraction=share)
        assert "too short" not in str(error.value)
        assert ("to train on" if share > 0.5 else "held out") in str(error.value)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"n_tokens": 7, "heldout_fraction": 0.5}, "use n_tokens=8 or more"),
        ({"context": 0}, "context=0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction=1.0 is not a share"),
    ],
)
def test_impossible_sizes_are_said(write_jsonl, build, options, said):
    with pytest.raises(UserError, match=said):
        build(write_jsonl(["1 2 3"]), **options)


def test_no_heldout_share_leaves_an_empty_stream(write_jsonl, build):
    split = build(write_jsonl(some_texts()), heldout_fraction=0)
    assert (split.train.n_sequences, split.heldout.n_sequences) == (100, 0)
    assert split.heldout.sequences(np.array([], dtype=int)).tokens.shape == (0, 4)


def test_progress_counts_up_to_what_is_wanted(write_jsonl, build, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 200)
    told = []
    build(write_jsonl(some_texts()), progress=lambda done, wanted: told.append((done, wanted)))
    assert {wanted for _, wanted in told} == {400} and len(told) > 3
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (400, 400)


def test_batch_and_table_sizes_leave_the_stream_as_it_is(write_jsonl, build, tmp_path, monkeypatch):
    config = write_jsonl(some_texts())
    build(config, folder=tmp_path / "a")
    monkeypatch.setattr(module, "BATCH_CHARS", 50)
    monkeypatch.setattr(stream_writer, "TABLE_ROWS", 3)
    stream = build(config, folder=tmp_path / "b").train
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert {k: v for k, v in a.items() if k.endswith("npy")} == {k: v for k, v in b.items() if k.endswith("npy")}
    assert stream.documents.equals(TokenStream(next((tmp_path / "a").glob("*/train"))).documents)


def test_no_more_is_read_or_tokenised_than_asked_for(write_jsonl, build, numbers, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 100)
    monkeypatch.setattr(module, "SHUFFLE_CHARS", 1000)
    tokenizer = numbers()
    build(write_jsonl(some_texts(3000)), tokenizer)
    assert len(tokenizer.encoded) < 200


@pytest.mark.parametrize("budget", [10, 100, 10_000])
def test_the_shuffle_is_a_permutation_that_holds_no_more_than_its_budget(monkeypatch, budget):
    monkeypatch.setattr(module, "SHUFFLE_CHARS", budget)
    pulled = []

    def source():
        for i in range(300):
            pulled.append(i)
            yield Document(f"{i:010d}", str(i), None)

    out = []
    for found in module._shuffled(source(), 5):
        out.append(int(found.source))
        assert len(pulled) - len(out) <= budget // 10 or len(pulled) == 300
    assert sorted(out) == list(range(300))
    assert out != list(range(300))


def test_an_interrupted_build_leaves_nothing_and_the_next_one_succeeds(write_jsonl, build, tmp_path):
    config = write_jsonl(some_texts())

    def interrupt(done, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config, progress=interrupt)
    assert [p.name for p in (tmp_path / "t").iterdir() if not p.name.endswith(".lock")] == []
    assert build(config).train.n_sequences == 75


SCRIPT = """
    import os, sys, logging
    from pathlib import Path
    from sae_dist.text.jsonl import JsonlText
    from sae_dist.text.tokenize import tokenize
    class Numbers:
        bos_token_id, eos_token_id = 1, None
        def get_vocab(self): return {str(n): n + 2 for n in range(1000)}
        def __call__(self, text, *, add_special_tokens, split_special_tokens):
            return {"input_ids": [[int(w) + 2 if w.isdecimal() else 0 for w in t.split()] for t in text]}
    def progress(done, wanted):
        print("built", flush=True)
        if sys.argv[3] == "die":
            os._exit(9)
    logging.basicConfig(level=logging.INFO)
    split = tokenize(JsonlText(path=sys.argv[1], category="kind"), Numbers(), context=4, n_tokens=400,
                     heldout_fraction=0.25, seed=0, folder=Path(sys.argv[2]), progress=progress)
    print(split.train.folder)
"""


def start(config, folder, what):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), config.path, str(folder), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_processes_that_want_the_same_text_one_builds_and_all_have_it(write_jsonl, build, tmp_path):
    config = write_jsonl(some_texts())
    racers = [start(config, tmp_path / "t", "live") for _ in range(2)]
    printed = [racer.communicate()[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sum("built" in words for words in printed) == 1
    assert {words[-1] for words in printed} == {str(build(config).train.folder)}


def test_what_a_killed_build_left_is_invisible_and_is_swept_by_the_next(write_jsonl, build, tmp_path):
    config = write_jsonl(some_texts())
    killed = start(config, tmp_path / "t", "die")
    assert killed.wait() == 9
    killed.communicate()
    left = [p.name for p in (tmp_path / "t").iterdir()]
    assert len(left) == 2 and all(name.startswith(".") for name in left)  # the lock and the unfinished folder
    split = build(config)
    assert sorted(p.name for p in (tmp_path / "t").iterdir() if p.is_dir()) == [split.train.folder.parent.name]


DAMAGE = {
    "a bit": lambda content: content[:150] + bytes([content[150] ^ 1]) + content[151:],
    "the end": lambda content: content[:-8],
    "all": lambda content: b"",
}


@pytest.mark.parametrize("name", ["train/tokens.npy", "heldout/starts.npy", "train/documents.arrow", "checksums.json"])
@pytest.mark.parametrize("what", DAMAGE)
def test_tokens_that_are_not_what_was_written_are_made_again(write_jsonl, build, tmp_path, caplog, name, what):
    config = write_jsonl(some_texts(80))
    folder = build(config, context=1).train.folder.parent
    before = tree(tmp_path / "t")
    (folder / name).write_bytes(DAMAGE[what]((folder / name).read_bytes()))
    build(config, context=1)
    assert tree(tmp_path / "t") == before
    assert "made again" in caplog.text


def test_a_file_of_the_tokens_that_is_gone_is_made_again(write_jsonl, build, tmp_path, caplog):
    config = write_jsonl(some_texts())
    folder = build(config).train.folder.parent
    before = tree(tmp_path / "t")
    (folder / "train" / "starts.npy").unlink()
    split = build(config)
    assert tree(tmp_path / "t") == before and "train/starts.npy: not what was written" in caplog.text
    assert len(split.digest) == 32 != build(config, seed=1).digest != split.digest


def test_a_stream_travels_by_its_folder(write_jsonl, build):
    stream = build(write_jsonl(some_texts())).train
    sent = pickle.dumps(stream)
    assert len(sent) < 500
    copy = pickle.loads(sent)
    assert np.array_equal(copy.sequences(np.arange(9)).doc, stream.sequences(np.arange(9)).doc)
    assert copy.categories() == stream.categories() and sum(stream.categories().values()) == len(stream.doc_ids)


def test_a_folder_that_is_no_stream_is_said(tmp_path):
    with pytest.raises(UserError, match="is no token stream"):
        TokenStream(tmp_path)


def test_a_split_knows_how_many_documents_were_not_taken_as_they_are(write_jsonl, build):
    config = write_jsonl(["1 2 3 4", "", *["5 6 7"] * 20, "\ud800 8 9 10 11"])  # with the separators 5, 4 and 6 tokens
    for _ in range(2):  # built, and found again
        counts = build(config, context=3, n_tokens=15, heldout_fraction=0.0).counts
        assert counts["empty"] == counts["undecodable"] == 1
        assert counts["repeated"] > 0


def test_a_build_says_what_it_made(write_jsonl, build, caplog):
    with caplog.at_level(logging.INFO):
        build(write_jsonl(["1 2 3", "1 2 3", "4 5 6"]), n_tokens=8, heldout_fraction=0)
    assert "8 tokens to train on in 2 documents, 0 held out in 0; 1 repeated documents left out" in caplog.text


def test_a_document_that_spells_a_control_token_does_not_become_one(write_jsonl, build):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(alphabet))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|s|>")
    assert fast("<|s|>a", add_special_tokens=False)["input_ids"][0] == fast.bos_token_id  # what must not happen
    stream = build(write_jsonl(["<|s|>a", "b"]), fast, n_tokens=9, context=1, heldout_fraction=0).train
    assert np.flatnonzero(stream.tokens == fast.bos_token_id).tolist() == sorted(stream.starts[:-1].tolist())
    assert len(stream.tokens) == len("<|s|>a") + len("b") + 2


def test_names_that_are_no_unicode_are_names_all_the_same(tmp_path, build):
    folder = tmp_path / "texts" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xe9t\xe9.txt")).write_text("1 2 3")
    config = FilesText(path=str(tmp_path / "texts"), category="folder")
    stream = build(config, context=1, n_tokens=4, heldout_fraction=0).train
    assert stream.documents["source"].to_pylist() == ["texts/caf\ufffd/\ufffdt\ufffd.txt"]
    assert list(stream.categories()) == ["caf\ufffd"]
