"""Token files: damage is noticed before a model reads it, and so is what happens to a file while it is in use."""

import json
from pathlib import Path

import numpy as np
import pytest

from onelayer import corpora
from onelayer.corpora import token_files, tokenizer
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("".join(f"line {i} of {i * i}\n" for i in range(2000)))
    return corpora.prepare(text, tmp_path_factory.mktemp("tokens"), vocabulary=300)


def damage(folder: Path, how: str) -> None:
    facts = json.loads((folder / "tokens.json").read_text())
    path = folder / "train.bin"
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-2])
    elif how == "one bit":
        data = bytearray(path.read_bytes())
        data[1000] ^= 4
        path.write_bytes(data)
    elif how == "no validation":
        (folder / "validation.bin").unlink()
    elif how == "half a fact":
        (folder / "tokens.json").write_text(json.dumps(facts)[:50])
    elif how == "facts missing":
        del facts["train"]["tokens"]
        (folder / "tokens.json").write_text(json.dumps(facts))
    elif how == "another version":
        (folder / "tokens.json").write_text(json.dumps(facts | {"format": 2}))
    elif how == "another tokenizer":
        (folder / "tokenizer.json").write_text(tokenizer.of_bytes().to_json())
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "unfinished":
        (folder / "tokens.json").unlink()
        (folder / "tokens.partial").touch()
    elif how == "no facts":
        (folder / "tokens.json").unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", "damaged or cut short"),
        ("one bit", "damaged or cut short"),
        ("no validation", "validation.bin cannot be read"),
        ("half a fact", "tokens.json is damaged"),
        ("facts missing", "tokens.json is damaged"),
        ("another version", "another version"),
        ("another tokenizer", "is not what made the tokens"),
        ("no tokenizer", "tokenizer.json cannot be read"),
        ("unfinished", "cut short"),
        ("no facts", "no tokens.json"),
    ],
)
def test_damaged_tokens_are_refused(how: str, said: str, pairs: corpora.Corpus, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in stored(pairs.folder).items():
        (copy / name).write_bytes(data)
    assert corpora.open_tokens(copy).describe() == pairs.describe()
    damage(copy, how)
    with pytest.raises(UsageError, match=said) as caught:
        corpora.open_tokens(copy)
    assert "\n" not in str(caught.value)


def test_missing_tokens_are_refused_and_an_unfinished_folder_is_never_read_as_text(tmp_path: Path):
    with pytest.raises(UsageError, match="There are no tokens"):
        corpora.open_tokens(tmp_path / "nowhere")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "train.bin").write_bytes(b"bytes that are text")
    (unfinished / "tokens.partial").touch()
    with pytest.raises(UsageError, match="cut short"):
        corpora.prepare(unfinished, tmp_path / "tokens")


def test_tokens_that_change_under_a_run_are_noticed(tmp_path: Path):
    path = tmp_path / "text.bin"
    token_files.write(path, [np.arange(100)], np.dtype(np.uint16))
    tokens = Tokens(path, np.dtype(np.uint16), vocabulary=100)
    assert tokens.read(np.array([3, 97]), 3).tolist() == [[3, 4, 5], [97, 98, 99]]
    with pytest.raises(UsageError, match="one of them is 99 in a vocabulary of 99"):
        Tokens(path, np.dtype(np.uint16), vocabulary=99).read(np.array([90]), 10)
    for starts, count in (([98], 3), ([-1], 3), ([0], 101)):
        with pytest.raises(IndexError):
            tokens.read(np.array(starts), count)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UsageError, match="have been damaged"):
        tokens.read(np.array([3]), 3)


def test_a_changed_byte_anywhere_in_a_small_file_and_the_length_of_any_change_the_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(token_files, "_BLOCK", 4)
    monkeypatch.setattr(token_files, "_BLOCKS", 8)
    path = tmp_path / "file"

    def seen(size: int) -> list[bool]:
        path.write_bytes(bytes(size))
        before = token_files.checksum(path)
        found = []
        for i in range(size):
            data = bytearray(size)
            data[i] = 1
            path.write_bytes(data)
            found.append(token_files.checksum(path) != before)
        path.write_bytes(bytes(size + 1))
        assert token_files.checksum(path) != before
        return found

    assert all(seen(31))
    assert all(seen(32))
    large = seen(401)
    assert 29 <= sum(large) <= 32
    assert large[0]
    assert large[-1]
