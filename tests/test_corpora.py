"""Corpora: what is read, what is refused, how it is split, and the windows drawn from it."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelayer import corpora
from onelayer.corpora import prepared, preparing, splits, texts, token_files, tokenizer
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig


@pytest.fixture
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | Path | None], corpora.Corpus]:
    return lambda data: corpora.prepare(data, tmp_path_factory.mktemp("tokens"))


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_book(folder: Path, chapters: int = 40) -> None:
    for i in range(chapters):
        chapter = folder / f"chapter{i:02d}"
        chapter.mkdir(parents=True)
        (chapter / "first.txt").write_text(f"chapter {i} begins\n" * 10)
        (chapter / "second.txt").write_text(f"chapter {i} ends\n" * 10)


def all_of(tokens: Tokens) -> npt.NDArray[np.int64]:
    return tokens.read(np.array([0]), len(tokens))[0].numpy()


def content(corpus: corpora.Corpus) -> tuple[bytes, bytes]:
    train, validation = (corpus.tokenizer.decode(all_of(part)) for part in (corpus.train, corpus.validation))
    assert (len(train), len(validation)) == (corpus.train_bytes, corpus.validation_bytes)
    return train, validation


def split_in_memory(documents: list[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """The split as it is documented, of a text that is all there."""

    def join(data: list[bytes]) -> bytes:
        return data[0] if len(data) == 1 else b"".join(d if d.endswith(b"\n") else d + b"\n" for d in data)

    sizes: dict[str, int] = {}
    for entry, data in documents:
        sizes[entry] = sizes.get(entry, 0) + len(data)
    total, held_out, size = sum(sizes.values()), set[str](), 0
    for entry in sorted(sizes, key=lambda entry: hashlib.sha256(entry.encode()).digest()):
        if size < 0.06 * total and size + sizes[entry] <= 0.10 * total:
            held_out.add(entry)
            size += sizes[entry]
    if size >= 0.06 * total:
        return join([d for e, d in documents if e not in held_out]), join([d for e, d in documents if e in held_out])
    text = join([data for _, data in documents])
    cut = len(text) - int(len(text) * 0.075)
    line = text.find(b"\n", cut, cut + int(len(text) * 0.075 / 10)) + 1
    if line:
        return text[:line], text[line:]
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return text[:cut], text[cut:]


def test_the_standard_library_is_the_default_and_is_library_source_only(load: Callable[[None], corpora.Corpus]):
    corpus = load(None)
    train, validation = content(corpus)
    assert corpus.tokenizer.is_bytes
    assert len(train) > 5_000_000
    assert 0.05 < len(validation) / len(train) < 0.12
    both = train + validation
    assert b"class ArgumentParser" in both
    assert b"class SequenceMatcher" in both
    assert b"decoding_table" not in both  # only the generated code pages have it
    assert b"class TestResultWithDebug" not in both
    _, documents, _ = texts.standard_library()
    assert (train, validation) == split_in_memory([(doc.entry, doc.path.read_bytes()) for doc in documents])
    # The fingerprint of earlier versions, so that what they trained on is still recognised.
    digest = hashlib.sha256(len(train).to_bytes(8, "big") + train + validation)
    assert corpus.fingerprint == digest.hexdigest()


@settings(max_examples=60)
@given(
    chapters=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.text("é\nx", min_size=1, max_size=80)), min_size=1),
    piece=st.integers(1, 50),
)
def test_a_stream_is_split_as_the_whole_text_is_whatever_its_pieces(chapters: list[tuple[str, str]], piece: int):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", piece)
        documents = [(entry, text.encode()) for entry, text in chapters]
        found: list[texts.Document] = []
        for i, (entry, data) in enumerate(documents):
            path = Path(name, f"{i}.txt")
            path.write_bytes(data)
            document = texts.text_file(path)
            found.append(texts.Document(entry, path, document.size, document.ends_line))
        parts = splits.split(found)
        streamed = tuple(b"".join(part.pieces()) for part in parts)
    assert streamed == split_in_memory(documents)
    assert tuple(map(len, streamed)) == tuple(part.size for part in parts)


def test_families_of_near_copies_count_as_one_entry():
    _, documents, _ = texts.standard_library()
    entries = {document.entry for document in documents}
    assert "argparse" in entries
    for family in texts._FAMILIES:
        assert entries.isdisjoint(family[1:])


def test_a_folder_is_split_by_whole_entries(tmp_path: Path, load: Callable[[Path], corpora.Corpus]):
    write_book(tmp_path)
    corpus = load(tmp_path)
    train, validation = content(corpus)
    for i in range(40):
        begins, ends = f"chapter {i} begins\n".encode(), f"chapter {i} ends\n".encode()
        assert (begins in train) == (ends in train) != (begins in validation) == (ends in validation)
    share = len(validation) / (len(train) + len(validation))
    assert 0.06 <= share <= 0.10
    assert corpus.train_files + corpus.validation_files == 80
    assert len(train) + len(validation) == sum(file.stat().st_size for file in tmp_path.rglob("*.txt"))


def test_a_folder_reads_the_same_wherever_it_lies_and_in_whatever_order_it_was_written(
    tmp_path: Path, load: Callable[[str | Path], corpora.Corpus]
):
    write_book(tmp_path / "here")
    for chapter in sorted((tmp_path / "here").iterdir(), reverse=True):
        for file in sorted(chapter.iterdir(), reverse=True):
            copy = tmp_path / "there" / chapter.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    here, there = load(tmp_path / "here"), load(str(tmp_path / "there"))
    assert here.fingerprint == there.fingerprint
    (tmp_path / "there" / "chapter07" / "first.txt").write_text("Another beginning.\n")
    assert load(tmp_path / "there").fingerprint != here.fingerprint


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 10_000), min_size=1, max_size=60))
def test_held_out_entries_make_up_their_share_or_nothing(sizes: dict[str, int]):
    held_out = splits._hold_out(sizes)
    total = sum(sizes.values())
    share = sum(sizes[entry] for entry in held_out) / total
    assert not held_out or 0.06 <= share <= 0.10 + 1e-9
    assert held_out == splits._hold_out(dict(reversed(sizes.items())))


def test_a_single_file_and_a_folder_of_few_files_hold_out_their_tail(
    tmp_path: Path, load: Callable[[Path], corpora.Corpus]
):
    lines = [f"line number {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    corpus = load(tmp_path / "a.txt")
    train, validation = content(corpus)
    assert train + validation == "".join(lines).encode()
    assert validation.startswith(b"line number")
    assert 0.05 <= len(validation) / len(train + validation) <= 0.10
    assert (corpus.train_files, corpus.validation_files) == (1, 1)
    (tmp_path / "b.txt").write_text("".join(lines))
    corpus = load(tmp_path)
    assert b"".join(content(corpus)) == train + validation + train + validation
    assert (corpus.train_files, corpus.validation_files) == (2, 1)
    assert "2 files" in corpus.describe()


def test_files_without_a_last_newline_do_not_run_together(tmp_path: Path, load: Callable[[Path], corpora.Corpus]):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two\n")
    assert b"".join(content(load(tmp_path))) == b"one\ntwo\n"


def test_a_folder_skips_what_is_not_text_and_says_how_much(tmp_path: Path, load: Callable[[Path], corpora.Corpus]):
    write_book(tmp_path)
    before = load(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    after = load(tmp_path)
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
    texts_folder, out = tmp_path / "texts", tmp_path / "run" / "tokens"
    texts_folder.mkdir()
    (texts_folder / name).write_bytes(data)
    with pytest.raises(UsageError, match=said):
        corpora.prepare(texts_folder / name, out)
    with pytest.raises(UsageError, match=f"holds no UTF-8 text, none of its 1 files is .{name}"):
        corpora.prepare(texts_folder, out)
    assert not out.parent.exists()


@given(
    text=st.text("aé日\U0001f600\n", min_size=1),
    bad=st.sampled_from([b"", b"\xff", b"\xe9\x80"]),
    piece=st.integers(1, 9),
)
def test_text_is_told_from_other_bytes_whatever_the_pieces_that_are_decoded(text: str, bad: bytes, piece: int):
    data = text.encode() + bad + "é".encode()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", piece)
        path = Path(name, "text.txt")
        path.write_bytes(data)
        found = texts._document("", path)
    expected: texts.Document | str = texts.Document("", path, len(data), ends_line=False)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        expected = f"is not UTF-8 text ({error.reason} at offset {error.start})"
    assert found == expected


def test_paths_that_are_no_text_are_refused(tmp_path: Path, load: Callable[[Path], corpora.Corpus]):
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="it has no files"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        load(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it has no files"):  # a pipe inside a folder is not waited for
        load(tmp_path)


def test_unreadable_files_are_refused_and_not_passed_over(
    tmp_path: Path, load: Callable[[Path], corpora.Corpus], monkeypatch: pytest.MonkeyPatch
):
    write_book(tmp_path)
    real = Path.open

    def refuse(self: Path, *arguments: str):
        if self.name == "first.txt":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(self, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"first.txt cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_a_text_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("a few words\n" * 20)
    document = texts.text_file(path)
    path.write_text("fewer")
    with pytest.raises(UsageError, match="has become shorter"):
        b"".join(splits.whole([document]).pieces())


def test_a_corpus_that_does_not_suit_the_model_is_refused(tmp_path: Path, load: Callable[[Path], corpora.Corpus]):
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    corpus = load(tmp_path / "short.txt")
    corpora.require(corpus, ModelConfig(context=len(corpus.validation) - 1))
    corpora.require(corpus, ModelConfig(context=1, vocabulary=300))
    with pytest.raises(UsageError, match="shorter than one context"):
        corpora.require(corpus, ModelConfig(context=len(corpus.validation)))
    with pytest.raises(UsageError, match="vocabulary of 256, the model's of 255"):
        corpora.require(corpus, ModelConfig(context=1, vocabulary=255))
    (tmp_path / "tiny.txt").write_text("a")
    with pytest.raises(UsageError, match="shorter than one context"):
        corpora.require(load(tmp_path / "tiny.txt"), ModelConfig(context=1))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    book = tmp_path_factory.mktemp("data") / "book"
    write_book(book)
    return book


@pytest.fixture(scope="module")
def pairs(book: Path, tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    return corpora.prepare(book, tmp_path_factory.mktemp("tokens"), vocabulary=300)


def test_pairs_are_learned_from_the_text_to_train_on_alone(pairs: corpora.Corpus, book: Path, tmp_path: Path):
    in_bytes = corpora.prepare(book, tmp_path / "bytes")
    assert content(pairs) == content(in_bytes)
    assert pairs.fingerprint == in_bytes.fingerprint
    assert pairs.tokenizer.fingerprint == tokenizer.train([content(in_bytes)[0]], 300).fingerprint
    assert pairs.train.dtype == np.uint16
    for part, text in zip((pairs.train, pairs.validation), content(in_bytes), strict=True):
        assert all_of(part).tolist() == pairs.tokenizer.encode(text).tolist()
        assert len(part) < 0.8 * len(text)
    assert f"as {len(pairs.train):,} and {len(pairs.validation):,} tokens of a vocabulary of 300" in pairs.describe()
    given = corpora.prepare(book, tmp_path / "given", tokenizer=pairs.tokenizer)
    assert (stored(given.folder), given.tokenizer.vocabulary) == (stored(pairs.folder), 300)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_preparation_gives_the_same_files_whatever_the_pieces(
    piece: int, pairs: corpora.Corpus, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(texts, "PIECE", piece)
    assert stored(corpora.prepare(book, tmp_path / "again", vocabulary=300).folder) == stored(pairs.folder)


def test_byte_pairs_are_learned_from_a_sample_of_all_of_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.txt").write_text("early words\n" * 500 + "late letters\n" * 500)
    monkeypatch.setattr(texts, "PIECE", 100)
    monkeypatch.setattr(preparing, "_SAMPLE", 2000)
    read: list[bytes] = []
    learn = preparing.learn

    def note(pieces: Iterator[bytes], vocabulary: int) -> tokenizer.Tokenizer:
        read.extend(pieces)
        return learn(read, vocabulary)

    monkeypatch.setattr(preparing, "learn", note)
    corpora.prepare(tmp_path / "text.txt", tmp_path / "tokens", vocabulary=260)
    sample = b"".join(read)
    assert 1000 < len(sample) <= 2000
    assert b"early" in sample
    assert b"late" in sample


def test_tokens_made_before_are_used_where_they_lie(pairs: corpora.Corpus, book: Path, tmp_path: Path):
    same = corpora.prepare(str(pairs.folder), tmp_path / "run" / "tokens", tokenizer=pairs.tokenizer)
    assert (same.folder, same.fingerprint, same.describe()) == (pairs.folder, pairs.fingerprint, pairs.describe())
    assert not (tmp_path / "run").exists()
    assert corpora.prepare(pairs.folder, tmp_path, vocabulary=300).folder == pairs.folder
    with pytest.raises(UsageError, match="vocabulary of 300 and not 256"):
        corpora.prepare(pairs.folder, tmp_path, vocabulary=256)
    with pytest.raises(UsageError, match="made by another tokenizer"):
        corpora.prepare(pairs.folder, tmp_path, tokenizer=tokenizer.of_bytes())
    with pytest.raises(UsageError, match="leave out one"):
        corpora.prepare(book, tmp_path, vocabulary=400, tokenizer=pairs.tokenizer)
    with pytest.raises(UsageError, match="255 and must be at least 256"):
        corpora.prepare(book, tmp_path / "run", vocabulary=255)
    assert not (tmp_path / "run").exists()


def test_what_is_in_the_way_is_left_as_it_is(book: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes.txt"):
        corpora.prepare(book, tmp_path)
    with pytest.raises(UsageError, match="cannot be made"):
        corpora.prepare(book, tmp_path / "notes.txt")
    with pytest.raises(UsageError, match=r"holds tokens.json"):
        corpora.prepare(book, corpora.prepare(book, tmp_path / "tokens").folder)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as if the disk had no room for more
    try:
        with pytest.raises(UsageError, match=r"cannot be written to .* \(File too large\)"):
            corpora.prepare(book, tmp_path / "run" / "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "run").exists()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_files.os, "fsync", full)
    with pytest.raises(UsageError, match=r"\(No space left on device\): free some space"):
        corpora.prepare(book, tmp_path / "run" / "tokens")
    assert not (tmp_path / "run").exists()


def test_preparation_that_was_killed_is_noticed_and_begun_anew(
    pairs: corpora.Corpus, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "tokens"
    monkeypatch.setattr(prepared, "finish", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(preparing, "finish", prepared.finish)
    child = os.fork()
    if child == 0:
        corpora.prepare(book, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()
    assert set(stored(out)) == {"train.bin", "validation.bin", "tokens.partial"}
    with pytest.raises(UsageError, match="cut short"):
        corpora.open_tokens(out)
    assert stored(corpora.prepare(book, out, vocabulary=300).folder) == stored(pairs.folder)


def test_memory_does_not_grow_with_the_text(tmp_path: Path):
    program = """
import resource, sys
from pathlib import Path
from onelayer import corpora
from onelayer.corpora import batches
folder = Path(sys.argv[1])
with (folder / "text.txt").open("wb") as file:
    for i in range(int(sys.argv[2])):
        file.write(b"%07d\\n" % i * (1 << 17))
corpus = corpora.prepare(folder / "text.txt", folder / "tokens")
for step in range(400):
    batches.batch(corpus.train, step, 16, 64, seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for mebibytes in (1, 96):
        (tmp_path / str(mebibytes)).mkdir()
        arguments = [sys.executable, "-c", program, str(tmp_path / str(mebibytes)), str(mebibytes)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 24 << 20
