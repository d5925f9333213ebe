"""The folder that a model is published in: read back bit for bit, whole or as it was, refused where parts disagree."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from onelayer import pretrained
from onelayer.corpora.tokenizer import of_bytes
from onelayer.corpora.tokenizer_file import special_ids, with_padding, without_padding
from onelayer.errors import UsageError
from onelayer.model_card import Measured, card
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel

CONFIG = ModelConfig(width=16, heads=2, context=32)
KINDS: dict[str, dict[str, Any]] = {
    "equilibrium": {},
    "untied": {"depth": "untied", "layers": 2},
    "trellisnet": {"architecture": "trellisnet", "kernel": 3},
    "own": {"own_unembedding": True},
    "everything": {
        "block": "subtracted",
        "positions": "relative",
        "weight_norm": True,
        "warm_start": True,
        "cutoffs": (20, 100),
    },
}
BYTES = Tokenizer.from_str(with_padding(of_bytes().to_json()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_bit_for_bit_without_a_random_number(kind: str, dtype: torch.dtype, tmp_path: Path):
    model = LanguageModel(replace(CONFIG, **KINDS[kind])).to(dtype).eval()
    pretrained.write(tmp_path / "model", model.config, model.state_dict())
    before = torch.get_rng_state()
    again = pretrained.read(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == model.config
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    expected, found = model.state_dict(), again.state_dict()
    assert list(expected) == list(found)
    assert all(found[name].dtype == dtype and torch.equal(found[name], expected[name]) for name in expected)
    tokens = torch.randint(0, 256, (2, 7))
    with torch.no_grad():
        # Elsewhere in memory a product may round otherwise.
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_saving_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = LanguageModel(CONFIG), LanguageModel(CONFIG)
    pretrained.write(tmp_path, CONFIG, first.state_dict(), card="the first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"No space left on device\).*make room"):
        pretrained.write(tmp_path, CONFIG, second.state_dict(), card="the first")
    monkeypatch.undo()
    assert torch.equal(pretrained.read(tmp_path).embedding.weight, first.embedding.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def _edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _larger_tokenizer() -> str:
    content = json.loads(with_padding(of_bytes().to_json()))
    content["added_tokens"].append({"id": 256, "content": "<eos>", "special": True})
    return json.dumps(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no model, it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda folder: _edit(folder, model_type="gpt2"), "of type 'gpt2' and architecture 'DEQForCausalLM', not of"),
        (lambda folder: _edit(folder, architectures=["Other"]), "architecture 'Other', not of"),
        (lambda folder: _edit(folder, rtol=-1), "rtol must lie between 0 and 1, not -1"),
        (lambda folder: _edit(folder, width="wide"), "value of the wrong type"),
        (lambda folder: _edit(folder, width=32), "do not fit the model in its config.json"),
        (lambda folder: _edit(folder, depth="untied"), "do not fit the model in its config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors are missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors are damaged"),
        (lambda folder: _flip(folder / "model.safetensors"), "checksum does not match"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(_larger_tokenizer()),
            "has 257 tokens and the model only",
        ),
    ],
)
def test_parts_that_are_damaged_or_disagree_are_named(damage: Any, says: str, tmp_path: Path):
    pretrained.write(tmp_path, CONFIG, LanguageModel(CONFIG).state_dict(), with_padding(of_bytes().to_json()))
    pretrained.read(tmp_path)
    damage(tmp_path)
    with pytest.raises(UsageError, match=says) as error:
        pretrained.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_saved(tmp_path: Path):
    weights = LanguageModel(replace(CONFIG, vocabulary=200)).state_dict()
    with pytest.raises(UsageError, match="256 tokens and the model only 200"):
        pretrained.write(
            tmp_path / "model", replace(CONFIG, vocabulary=200), weights, with_padding(of_bytes().to_json())
        )
    assert not (tmp_path / "model").exists()


@given(st.text())
def test_byte_tokens_are_the_bytes_of_any_text(text: str):
    ids = BYTES.encode(text).ids
    assert ids == list(text.encode())
    assert BYTES.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["", "\0", "a\0b\0\0", "Ā\0Ġ Ċ", " a  .  b 's", "<pad>\r\n\t", "日本語 🙂 é e\u0301"])
def test_byte_tokens_of_texts_that_tokenizers_trip_over(text: str):
    assert BYTES.encode(text).ids == list(text.encode())
    assert BYTES.decode(list(text.encode()), skip_special_tokens=False) == text


def test_a_byte_level_tokenizer_pads_with_byte_0_and_is_read_back_as_it_was(tmp_path: Path):
    content = json.loads(without_padding(with_padding(of_bytes().to_json())))
    content["model"]["vocab"]["aĀ"] = 256
    merging = json.dumps(content | {"model": content["model"] | {"merges": [["a", "Ā"]]}})
    assert with_padding(merging) == merging  # it would not load without the letter that it merges
    content["model"] |= {"vocab": content["model"]["vocab"] | {"ab": 257}, "merges": ["a b"]}
    plain = json.dumps(content, ensure_ascii=False)
    padded = Tokenizer.from_str(with_padding(plain))
    assert special_ids(with_padding(plain)) == {"pad_token_id": 0}
    for text in ("ab\0abĀ", "cab", "\0"):
        ids = padded.encode(text).ids
        assert padded.decode(ids, skip_special_tokens=False) == text
        assert [id for id in ids if id] == [id for id in Tokenizer.from_str(plain).encode(text).ids if id]
    config = replace(CONFIG, vocabulary=258)
    pretrained.write(tmp_path, config, LanguageModel(config).state_dict(), plain)
    again = pretrained.read_tokenizer(tmp_path)
    assert again is not None
    assert json.loads(again) == json.loads(plain)


def test_a_card_states_what_was_measured_and_what_was_not():
    counts = LanguageModel(CONFIG).parameter_counts()
    unmeasured = card(CONFIG, counts)
    assert unmeasured.count("| not measured |") == 4
    assert "relative residual 0.005, at most 64 evaluations" in unmeasured
    assert f"{counts[0]:,}" in unmeasured
    good = card(CONFIG, counts, "some books", 12345, Measured(2.125, 12.7, 4.2e-3, 0.05))
    for says in (
        "2.125 bits per byte",
        "12.7 on average",
        "4.2e-03",
        "5.0%",
        "some books",
        "12,345",
        "at its equilibrium",
    ):
        assert says in good, says
    assert "not measured" not in good
    assert "not an equilibrium" not in good
    capped = card(CONFIG, counts, measured=Measured(share_at_cap=0.051))
    assert "# Transformer of one layer applied up to 64 times" in capped
    assert "network of up to 64 steps of one layer, not an equilibrium" in capped
    explicit = card(replace(CONFIG, depth="untied"), counts)
    assert "# Transformer of 6 layers" in explicit
    assert "evaluations" not in explicit
    for text in (unmeasured, good, capped, explicit):
        assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
        assert "license" not in text
