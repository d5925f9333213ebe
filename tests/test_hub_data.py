"""Data sets of Hugging Face: their text as their own library reads it from local folders, and what cannot be read."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from onelayer import corpora
from onelayer.errors import UsageError


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(corpus: corpora.Corpus) -> tuple[str, ...]:
    return tuple(
        corpus.tokenizer.decode((corpus.folder / f"{part}.bin").read_bytes()).decode()
        for part in ("train", "validation")
    )


def test_a_data_set_keeps_its_own_split(tmp_path: Path):
    write(tmp_path / "set", "train", [{"id": 1, "text": "one\n"}, {"id": 2, "text": ""}, {"id": 3, "text": "drei é"}])
    write(tmp_path / "set", "validation", [{"id": 4, "text": "four\nlines"}, {"id": 5, "text": None}])
    write(tmp_path / "set", "test", [{"id": 6, "text": "never read"}])
    corpus = corpora.prepare(f"hf:{tmp_path / 'set'}", tmp_path / "tokens")
    assert texts(corpus) == ("one\ndrei é\n", "four\nlines\n")
    assert corpus.name == f"hf:{tmp_path / 'set'}"
    assert {path.suffix for path in corpus.folder.iterdir()} == {".bin", ".json"}  # the text itself is not kept


def test_a_data_set_without_validation_is_split_as_a_file_is(tmp_path: Path):
    rows = [f"row number {i}\n" for i in range(1000)]
    write(tmp_path / "set", "train", [{"text": row} for row in rows])
    (tmp_path / "text.txt").write_text("".join(rows))
    corpus = corpora.prepare(f"hf:{tmp_path / 'set'}", tmp_path / "tokens", vocabulary=270)
    expected = corpora.prepare(tmp_path / "text.txt", tmp_path / "expected", vocabulary=270)
    assert corpus.fingerprint == expected.fingerprint
    for part in ("train.bin", "validation.bin", "tokenizer.json"):
        assert (corpus.folder / part).read_bytes() == (expected.folder / part).read_bytes()


def test_all_columns_of_strings_are_the_text_where_none_is_named_so(tmp_path: Path):
    write(tmp_path / "set", "train", [{"question": "why?", "n": 3, "answer": "so"}, {"question": "how?", "answer": ""}])
    write(tmp_path / "set", "validation", [{"question": "who?", "n": 1, "answer": "you"}])
    rows = datasets.Dataset.from_list([{"n": 1, "question": None}, {"n": 2, "question": "where?"}])
    (tmp_path / "typed").mkdir()
    rows.cast_column("question", datasets.Value("string")).to_parquet(tmp_path / "typed" / "train.parquet")
    assert "".join(texts(corpora.prepare(f"hf:{tmp_path / 'typed'}", tmp_path / "typed tokens"))) == "where?\n"
    corpus = corpora.prepare(f"hf:{tmp_path / 'set'}", tmp_path / "tokens")
    assert texts(corpus) == ("why?\nso\nhow?\n", "who?\nyou\n")


def test_a_configuration_is_named_after_a_colon(tmp_path: Path):
    card = "---\nconfigs:\n"
    card += "- config_name: en\n  data_files: english.jsonl\n- config_name: de\n  data_files: german.jsonl\n---\n"
    folder = tmp_path / "set"
    for name in ("english", "german"):
        write(folder, name, [{"text": f"{name} {i}"} for i in range(100)])
    (folder / "README.md").write_text(card)
    for configuration, language in (("en", "english"), ("de", "german")):
        corpus = corpora.prepare(f"hf:{folder}:{configuration}", tmp_path / configuration)
        assert "".join(texts(corpus)) == "".join(f"{language} {i}\n" for i in range(100))
    refused(f"hf:{folder}", tmp_path / "run", "en")  # one has to be chosen
    refused(f"hf:{folder}:fr", tmp_path / "run", "fr")


def refused(data: str, folder: Path, *said: str) -> None:
    with pytest.raises(UsageError) as caught:
        corpora.prepare(data, folder / "tokens")
    assert all(words in str(caught.value) for words in said), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_data_sets_without_text_are_refused(tmp_path: Path):
    write(tmp_path / "numbers", "train", [{"id": 1, "label": 2}])
    refused(f"hf:{tmp_path / 'numbers'}", tmp_path / "run", "has no column of text, only id, label")
    write(tmp_path / "empty", "train", [{"text": ""}])
    refused(f"hf:{tmp_path / 'empty'}", tmp_path / "run", "has no text in it")
    write(tmp_path / "tests", "test", [{"text": "a"}])
    write(tmp_path / "tests", "validation", [{"text": "a"}])
    refused(f"hf:{tmp_path / 'tests'}", tmp_path / "run", "has no split train, only")
    write(tmp_path / "broken", "train", [{"text": "a"}])
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    refused(f"hf:{tmp_path / 'broken'}", tmp_path / "run", "cannot be read")


def test_names_that_lead_nowhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("hf:nobody/nothing", tmp_path / "run", "hf:nobody/nothing cannot be read", "check the network")
    refused(f"hf:{tmp_path / 'nowhere'}", tmp_path / "run", "cannot be read")
    refused("hf:", tmp_path / "run", "name no data set")


def test_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:owner/name", tmp_path / "run", "pip install 'equilibria[hf]'")
