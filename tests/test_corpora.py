"""Corpora: what is read, what is refused, how it is split, and the windows drawn from it."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onelayer import corpora, texts
from onelayer.errors import UsageError


def write_book(folder: Path, chapters: int = 40) -> None:
    for i in range(chapters):
        chapter = folder / f"chapter{i:02d}"
        chapter.mkdir(parents=True)
        (chapter / "first.txt").write_text(f"chapter {i} begins\n" * 10)
        (chapter / "second.txt").write_text(f"chapter {i} ends\n" * 10)


def content(corpus: corpora.Corpus) -> tuple[bytes, bytes]:
    return corpus.train.numpy().tobytes(), corpus.validation.numpy().tobytes()


def test_the_standard_library_is_the_default_and_is_library_source_only():
    corpus = corpora.load()
    train, validation = content(corpus)
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint8
    assert len(train) > 5_000_000
    assert 0.05 < len(validation) / len(train) < 0.12
    both = train + validation
    assert b"class ArgumentParser" in both
    assert b"class SequenceMatcher" in both
    assert b"decoding_table" not in both  # only the generated code pages have it
    assert b"class TestResultWithDebug" not in both
    assert corpus.fingerprint == corpora.load().fingerprint


def test_families_of_near_copies_count_as_one_entry():
    _, documents, _ = texts.standard_library()
    entries = {document.entry for document in documents}
    assert "argparse" in entries
    for family in texts._FAMILIES:
        assert entries.isdisjoint(family[1:])


def test_a_folder_is_split_by_whole_entries(tmp_path: Path):
    write_book(tmp_path)
    corpus = corpora.load(tmp_path)
    train, validation = content(corpus)
    for i in range(40):
        begins, ends = f"chapter {i} begins\n".encode(), f"chapter {i} ends\n".encode()
        assert (begins in train) == (ends in train) != (begins in validation) == (ends in validation)
    share = len(validation) / (len(train) + len(validation))
    assert 0.06 <= share <= 0.10
    assert corpus.train_files + corpus.validation_files == 80
    assert len(train) + len(validation) == sum(file.stat().st_size for file in tmp_path.rglob("*.txt"))


def test_a_folder_reads_the_same_wherever_it_lies_and_in_whatever_order_it_was_written(tmp_path: Path):
    write_book(tmp_path / "here")
    for chapter in sorted((tmp_path / "here").iterdir(), reverse=True):
        for file in sorted(chapter.iterdir(), reverse=True):
            copy = tmp_path / "there" / chapter.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    here, there = corpora.load(tmp_path / "here"), corpora.load(str(tmp_path / "there"))
    assert here.fingerprint == there.fingerprint
    (tmp_path / "there" / "chapter07" / "first.txt").write_text("Another beginning.\n")
    assert corpora.load(tmp_path / "there").fingerprint != here.fingerprint


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 10_000), min_size=1, max_size=60))
def test_held_out_entries_make_up_their_share_or_nothing(sizes: dict[str, int]):
    held_out = corpora._hold_out(sizes)
    total = sum(sizes.values())
    share = sum(sizes[entry] for entry in held_out) / total
    assert not held_out or 0.06 <= share <= 0.10 + 1e-9
    assert held_out == corpora._hold_out(dict(reversed(sizes.items())))


@given(st.text(min_size=20, max_size=2_000))
def test_a_single_file_is_cut_near_its_end_and_between_characters(text: str):
    data = text.encode()
    cut = corpora._tail_start(data)
    assert 0.9 * len(data) - 4 <= cut <= len(data)
    data[:cut].decode()
    data[cut:].decode()


def test_a_single_file_and_a_folder_of_few_files_hold_out_their_tail(tmp_path: Path):
    lines = [f"line number {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    train, validation = content(corpora.load(tmp_path / "a.txt"))
    assert train + validation == "".join(lines).encode()
    assert validation.startswith(b"line number")
    assert 0.05 <= len(validation) / len(train + validation) <= 0.10
    (tmp_path / "b.txt").write_text("".join(lines))
    corpus = corpora.load(tmp_path)
    assert b"".join(content(corpus)) == train + validation + train + validation
    assert (corpus.train_files, corpus.validation_files) == (2, 1)
    assert "2 files" in corpus.describe()


def test_files_without_a_last_newline_do_not_run_together(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two\n")
    assert b"".join(content(corpora.load(tmp_path))) == b"one\ntwo\n"


def test_a_folder_skips_what_is_not_text_and_says_how_much(tmp_path: Path):
    write_book(tmp_path)
    before = corpora.load(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    after = corpora.load(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.skipped_files == 2
    assert "2 files skipped" in after.describe()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "Gr\xfc\xdfe".encode("latin-1"), r"latin.txt is not UTF-8 text .* at offset 2"),
        ("wide.txt", "hello".encode("utf-16-le"), "zero byte at offset 1"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path: Path, name: str, data: bytes, said: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=said):
        corpora.load(tmp_path / name)
    with pytest.raises(UsageError, match=f"holds no UTF-8 text, none of its 1 files is .{name}"):
        corpora.load(tmp_path)


def test_a_bad_byte_is_found_across_the_pieces_that_are_decoded():
    data = b"a" * ((1 << 24) - 1) + "é".encode()
    assert texts._why_not_text(data) is None
    assert "at offset 16777215" in str(texts._why_not_text(data[:-1] + b"a"))


def test_paths_that_are_no_text_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="does not exist"):
        corpora.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="it has no files"):
        corpora.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        corpora.load(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it has no files"):  # a pipe inside a folder is not waited for
        corpora.load(tmp_path)


def test_unreadable_files_are_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_book(tmp_path)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"first.txt cannot be read \(Permission denied\)"):
        corpora.load(tmp_path)


def test_a_corpus_shorter_than_one_context_is_refused(tmp_path: Path):
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    corpus = corpora.load(tmp_path / "short.txt")
    corpora.require(corpus, len(corpus.validation) - 1)
    with pytest.raises(UsageError, match="shorter than one context"):
        corpora.require(corpus, len(corpus.validation))
    with pytest.raises(UsageError, match="at least 1"):
        corpora.require(corpus, 0)
    (tmp_path / "tiny.txt").write_text("a")
    with pytest.raises(UsageError, match="shorter than one context"):
        corpora.require(corpora.load(tmp_path / "tiny.txt"), 1)


@given(
    length=st.integers(2, 200),
    context=st.integers(1, 199),
    size=st.integers(1, 9),
    step=st.integers(0),
    seed=st.integers(0),
)
def test_a_batch_is_windows_of_the_text_and_depends_on_seed_and_step_alone(
    length: int, context: int, size: int, step: int, seed: int
):
    context = min(context, length - 1)
    tokens = torch.arange(length, dtype=torch.uint8)
    state = torch.random.get_rng_state()
    inputs, targets = corpora.batch(tokens, step, size, context, seed)
    again, _ = corpora.batch(tokens, step, size, context, seed)
    assert inputs.shape == targets.shape == (size, context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs, again)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))
    assert torch.equal(state, torch.random.get_rng_state())


def test_batches_of_different_steps_and_seeds_differ_and_cover_the_text():
    tokens = torch.arange(200, dtype=torch.uint8)
    draws = [corpora.batch(tokens, step, 64, 4, seed)[0] for step in range(40) for seed in range(2)]
    assert len({hashlib.sha256(draw.numpy().tobytes()).digest() for draw in draws}) == 80
    starts = torch.cat(draws)[:, 0]
    assert set(starts.tolist()) == set(range(196))


@given(length=st.integers(2, 250), context=st.integers(1, 249), count=st.integers(1, 300))
def test_validation_windows_never_predict_the_same_byte_twice(length: int, context: int, count: int):
    context = min(context, length - 1)
    inputs, targets = corpora.validation_windows(torch.arange(length, dtype=torch.uint8), context, count)
    assert len(inputs) == min(count, (length - 1) // context)
    assert torch.equal(targets, inputs + 1)
    predicted = targets.flatten().tolist()
    assert len(set(predicted)) == len(predicted)
    if len(inputs) > 1:
        assert inputs[0, 0] == 0
        assert targets[-1, -1] == length - 1


@pytest.mark.parametrize(("context", "count"), [(0, 1), (1, 0), (10, 1), (-1, 1)])
def test_meaningless_windows_are_refused(context: int, count: int):
    tokens = torch.arange(10, dtype=torch.uint8)
    with pytest.raises(UsageError):
        corpora.batch(tokens, 0, count, context, 0)
    with pytest.raises(UsageError):
        corpora.validation_windows(tokens, context, count)


def test_negative_seeds_are_refused():
    with pytest.raises(UsageError, match="0 or more"):
        corpora.batch(torch.arange(10, dtype=torch.uint8), 0, 1, 2, seed=-1)
