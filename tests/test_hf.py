"""Citizens of transformers: what generation, caches, Trainer and pipelines make of a model is what the model says."""

import importlib
import json
import re
import sys
from dataclasses import fields
from functools import cache as kept
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GPT2Config,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

import equilibria as eq
from onelayer import pretrained
from onelayer.corpora.tokenizer import of_bytes
from onelayer.corpora.tokenizer_file import with_padding
from onelayer.errors import UsageError
from onelayer.hf import DEQConfig, DEQForCausalLM
from onelayer.models.configuration import ModelConfig

SIZES: dict[str, Any] = {"width": 32, "heads": 2, "context": 64}
EXACT: dict[str, Any] = SIZES | {"rtol": 1e-9, "eval_max_steps": 100}
KINDS: dict[str, dict[str, Any]] = {
    "equilibrium": {},
    "relative": {"positions": "relative"},
    "subtracted": {"block": "subtracted"},
    "trellisnet": {"architecture": "trellisnet", "kernel": 3},
    "untied": {"depth": "untied", "layers": 3},
    "tied": {"depth": "tied", "layers": 3},
    "trellisnet untied": {"architecture": "trellisnet", "depth": "untied", "layers": 2},
}
# As a cache is asked of `generate`.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 4},
    "static in chunks": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


def model_of(kind: str = "equilibrium", **values: Any) -> DEQForCausalLM:
    """A model whose block contracts on all texts, and that writes varied ones.

    As it is drawn, its tied logits would repeat the last byte for ever.
    """
    torch.manual_seed(0)
    model = DEQForCausalLM(DEQConfig(**(SIZES | KINDS[kind] | values))).eval()
    nn.init.normal_(model.model.norm.weight, std=2.0)
    with torch.no_grad():
        for parameter in model.model.depth.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.8)
    return model


def exact_model(kind: str = "equilibrium") -> DEQForCausalLM:
    return model_of(kind, **EXACT).double()


def some_prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = [(1, 2, 5, 8, 11)[k % 5] for k in range(count)]
    return [torch.randint(1, 256, (length,), generator=draw).tolist() for length in lengths]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@kept
def by_hand(kind: str, prompts: int, count: int) -> list[list[int]]:
    """The likeliest token, again and again, each from the whole text before it, by the model alone."""
    return written_by(exact_model(kind), some_prompts(prompts), count)


def written_by(model: DEQForCausalLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    for length in sorted(set(map(len, prompts))):
        group = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
        text = torch.tensor([prompts[k] for k in group])
        for _ in range(count):
            with torch.no_grad():
                logits = model.model(text).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        for k, row in zip(group, text[:, length:].tolist(), strict=True):
            written[k] = row
    return written


@pytest.mark.parametrize("cache", CACHES)
def test_50_prompts_go_on_as_by_hand_whatever_the_cache(cache: str):
    model, prompts = exact_model(), some_prompts(50)
    inputs = padded(prompts)
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, **CACHES[cache])
    assert isinstance(found, Tensor)
    expected = by_hand("equilibrium", 50, 6)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected
    assert len({token for row in expected for token in row}) > 60
    assert sum(len(set(row)) > 3 for row in expected) > 25


@pytest.mark.parametrize("cache", ["dynamic", "static in chunks", "none"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "equilibrium"])
def test_every_kind_of_model_goes_on_as_by_hand(kind: str, cache: str):
    model, prompts = exact_model(kind), some_prompts(5)
    found = model.generate(**padded(prompts), max_new_tokens=5, do_sample=False, **CACHES[cache])
    assert isinstance(found, Tensor)
    expected = by_hand(kind, 5, 5)
    assert found[:, -5:].tolist() == expected
    assert len({token for row in expected for token in row}) > 5


@pytest.mark.parametrize("kind", ["equilibrium", "untied", "trellisnet"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "temperature": 1.5},
        {"do_sample": True, "top_k": 40, "num_return_sequences": 2},
    ],
    ids=["beams", "beams drawn", "drawn"],
)
def test_beams_and_draws_do_not_depend_on_the_cache(kind: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    reordered: list[list[int]] = []
    reorder = DynamicCache.reorder_cache
    monkeypatch.setattr(
        DynamicCache, "reorder_cache", lambda self, order: reordered.append(order.tolist()) or reorder(self, order)
    )
    model, inputs = exact_model(kind), padded(some_prompts(4))
    found = {}
    for cache in ("none", "dynamic", "static"):
        torch.manual_seed(3)
        found[cache] = model.generate(**inputs, max_new_tokens=5, **how, **CACHES[cache]).tolist()
    assert found["dynamic"] == found["none"]
    assert found["static"] == found["none"]
    if "num_beams" in how:
        assert any(order != sorted(order) for order in reordered)
    else:
        assert found["none"][::2] != found["none"][1::2]


def test_a_static_cache_compiles_nothing_on_its_own(monkeypatch: pytest.MonkeyPatch):
    compiling = CompileConfig()
    compiling._compile_all_devices = True
    monkeypatch.setattr(DEQForCausalLM, "get_compiled_call", lambda *_: pytest.fail("It was compiled."))
    model, inputs = model_of(), padded(some_prompts(2))
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    found = model.generate(**inputs, **how, compile_config=compiling)
    assert found.tolist() == model.generate(**inputs, **how).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_no_logits(kind: str):
    model, prompts = exact_model(kind), some_prompts(5)
    together = model(**padded(prompts)).logits
    for prompt, row in zip(prompts, together, strict=True):
        alone = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(row[-len(prompt) :], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("kind", ["equilibrium", "trellisnet"])
def test_logits_by_the_cache_are_those_of_the_whole_to_the_tolerance(kind: str, rtol: float):
    model = model_of(kind, rtol=rtol, eval_max_steps=300)
    tokens = torch.randint(1, 256, (4, 32))
    with torch.no_grad():
        whole = model(tokens, use_cache=False)
        pieces = [model(tokens[:, :16])]
        for token in tokens[:, 16:].split(1, dim=1):
            pieces.append(model(token, cache=pieces[-1].cache))
    assert all(bool(piece.converged.all()) for piece in [whole, *pieces])
    apart = torch.cat([piece.logits for piece in pieces], dim=1) - whole.logits
    assert apart.abs().max() > 0
    assert float((apart.norm(dim=(1, 2)) / whole.logits.norm(dim=(1, 2))).max()) <= 10 * rtol


@pytest.mark.parametrize("kind", ["equilibrium", "untied", "trellisnet"])
def test_a_cache_holds_the_keys_and_values_of_the_solution_in_its_slots(kind: str):
    model, tokens = exact_model(kind), torch.randint(1, 256, (2, 9))
    slots = model.config.num_hidden_layers
    assert slots == (1 if kind != "untied" else 3)
    expected = model.model(tokens, remember=True).left
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=12)):
        model(tokens[:, :5], cache=cache)
        found = model(tokens[:, 5:], cache=cache).cache
        assert found is cache
        assert int(cache.get_seq_length()) == 9
        assert len(cache.layers) == slots
        for layer, (keys, values) in zip(cache.layers, expected, strict=True):
            torch.testing.assert_close(layer.keys[:, :, :9], keys, rtol=0, atol=1e-7)
            torch.testing.assert_close(layer.values[:, :, :9], values, rtol=0, atol=1e-7)


def test_the_output_and_a_monitor_tell_how_each_token_was_solved():
    model = model_of(rtol=1e-4, eval_max_steps=7)
    inputs = padded(some_prompts(3))
    output = model(**inputs)
    solution = model.model(inputs["input_ids"], real=inputs["attention_mask"]).solution
    assert torch.equal(output.evaluations, solution.steps)
    assert torch.equal(output.residual, solution.residual)
    assert not bool(output.converged.any())
    assert int(output.evaluations.max()) == 7
    with eq.monitor(model) as reports:
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert [tuple(report.steps.shape) for report in reports] == [(3,)] * 5
    explicit = model_of("untied")(**inputs)
    assert explicit.evaluations is explicit.residual is explicit.converged is None


@pytest.mark.parametrize("kind", [*KINDS, "everything", "own"])
def test_a_saved_model_is_loaded_bit_for_bit(kind: str, tmp_path: Path):
    more = {
        "everything": {"weight_norm": True, "warm_start": True, "cutoffs": (20, 100), "block": "subtracted"},
        "own": {"own_unembedding": True},
    }
    model = model_of("equilibrium", **more[kind]) if kind in more else model_of(kind)
    tokens = torch.randint(1, 256, (2, 9))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    pretrained.write(tmp_path / "own", model.model.config, model.model.state_dict())
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    for folder in ("one", "parts", "own"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(again) is DEQForCausalLM
        assert again.config.to_model_config() == model.model.config
        assert {name: value.tolist() for name, value in again.state_dict().items()} == {
            name: value.tolist() for name, value in model.state_dict().items()
        }
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert torch.equal(pretrained.read(tmp_path / folder)(tokens).logits, model(tokens).logits)


def test_options_can_be_changed_where_a_model_is_loaded(tmp_path: Path):
    model_of().save_pretrained(tmp_path)
    tight = AutoModelForCausalLM.from_pretrained(tmp_path, rtol=1e-6, eval_max_steps=200, dtype=torch.float64)
    assert tight.model.config.rtol == 1e-6
    assert tight.dtype == torch.float64
    output = tight(torch.randint(1, 256, (2, 9)))
    assert bool(output.converged.all())
    assert float(output.residual.max()) <= 1e-6
    with pytest.raises(UsageError, match="rtol must lie between 0 and 1, not 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, rtol=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_and_is_saved_as_such(dtype: torch.dtype, tmp_path: Path):
    model, tokens = model_of(rtol=1e-2), torch.randint(1, 256, (4, 12))
    expected = model(tokens).logits.detach()
    half = model.to(dtype)
    logits = half(tokens).logits.detach()
    assert logits.dtype == dtype
    assert float((logits.float() - expected).norm() / expected.norm()) < 0.1
    assert half.generate(tokens, max_new_tokens=3, do_sample=False).shape == (4, 15)
    half.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_the_configuration_has_the_fields_and_defaults_of_a_model():
    ours = DEQConfig()
    assert ours.to_model_config() == ModelConfig()
    assert {field.name for field in fields(ModelConfig)} <= {field.name for field in fields(DEQConfig)}
    renamed = DEQConfig(vocab_size=300, hidden_size=64, num_attention_heads=2, max_position_embeddings=99)
    assert renamed.to_model_config() == ModelConfig(vocabulary=300, width=64, heads=2, context=99)


@pytest.mark.parametrize("kind", ["equilibrium", "untied", "adaptive"])
def test_the_loss_is_that_of_the_next_tokens_that_count(kind: str):
    model = model_of(cutoffs=(20, 100)) if kind == "adaptive" else model_of(kind)
    tokens = torch.randint(1, 256, (3, 10))
    labels = tokens.clone()
    labels[0, 6:] = -100
    labels[2] = -100
    output = model(tokens, labels=labels)
    losses = model.model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    counted = torch.cat([losses[0, :5], losses[1]])
    torch.testing.assert_close(output.loss, counted.mean(), rtol=0, atol=0.02)  # solves of other lengths
    logits = output.logits[:, :-1].flatten(0, 1).float()
    exact = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, exact)
    given = model(tokens, labels=labels, num_items_in_batch=torch.tensor(28)).loss
    torch.testing.assert_close(given, exact * 14 / 28)
    assert model(tokens, labels=torch.full_like(labels, -100)).loss.item() == 0


def test_parts_of_a_batch_add_up_to_its_loss_with_all_that_training_adds():
    model = model_of(warm_start=True, rtol=1e-6, max_steps=200).train()
    nn.init.normal_(model.model.guess.weight)
    tokens = torch.randint(1, 256, (4, 10))
    whole = model(tokens, labels=tokens).loss
    parts = [model(part, labels=part, num_items_in_batch=36).loss for part in tokens.split(2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=0)
    without = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert (whole - without).item() > 0.5  # of the guess


@pytest.mark.parametrize("kind", ["equilibrium", "untied"])
def test_trainer_trains_evaluates_and_saves(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    model = DEQForCausalLM(
        DEQConfig(width=32, heads=2, context=16, layers=2, depth="untied" if kind == "untied" else "equilibrium")
    )
    text = torch.tensor(list((b"the quick brown fox jumps over the lazy dog. " * 40)[: 16 * 100])).view(100, 16)
    rows = [{"input_ids": row, "labels": row} for row in text]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=25,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_steps=25,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:10])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # With the items of all its parts, the loss of an update is a mean over tokens, near log 256 at the start.
    assert losses[0] == pytest.approx(before, abs=0.5)
    assert losses[-1] < losses[0] - 2
    assert trainer.evaluate()["eval_loss"] < before - 2
    logits = trainer.predict(rows[:10]).predictions
    assert logits.shape == (10, 16, 256)
    again = DEQForCausalLM.from_pretrained(tmp_path / "checkpoint-25")
    assert torch.equal(again.model.embedding.weight, model.model.embedding.weight)


def test_trainer_gives_every_token_of_an_accumulated_batch_the_same_weight(tmp_path: Path):
    model = model_of(rtol=1e-6, max_steps=200).train()
    tokens = torch.randint(1, 256, (2, 12))
    labels = tokens.clone()
    labels[1, 3:] = -100
    expected = model(tokens, labels=labels).loss.item()
    means = [model(part, labels=part).loss.item() for part in (tokens[:1], tokens[1:, :3])]
    assert abs(expected - sum(means) / 2) > 0.1
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = model_of()
    pretrained.write(
        tmp_path / "model", model.model.config, model.model.state_dict(), with_padding(of_bytes().to_json()), "A card."
    )
    return tmp_path / "model"


def test_a_pipeline_writes_what_generate_does(folder: Path):
    writer = pipeline("text-generation", model=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.padding_side, len(tokenizer)) == (0, "left", 256)
    prompts = ["Once upon", "é", "a longer one, "]
    texts = [found[0]["generated_text"] for found in writer(prompts, max_new_tokens=6, do_sample=False, batch_size=3)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assert inputs["attention_mask"].sum(1).tolist() == [9, 2, 14]
    expected = writer.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [text[: len(prompt)] for text, prompt in zip(texts, prompts, strict=True)] == prompts


def test_a_tokenizer_saved_by_transformers_is_the_same(folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "Ā\0é 🙂\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] == list(text.encode())
    assert again.decode(list(text.encode())) == text


def test_hidden_states_and_tuples_are_had_where_asked_for():
    model, tokens = model_of(), torch.randint(1, 256, (2, 5))
    output = model(tokens, output_hidden_states=True, logits_to_keep=2)
    assert output.logits.shape == (2, 2, 256)
    assert torch.equal(output.logits, model(tokens).logits[:, -2:])
    (state,) = output.hidden_states
    assert torch.equal(state, model.model(tokens).state)
    logits, *_ = model(tokens, return_dict=False)
    assert torch.equal(logits, model(tokens).logits)
    assert model(tokens).cache is not None
    assert model.train()(tokens).cache is None  # training keeps nothing that it does not need


def _offloaded(model: DEQForCausalLM) -> Any:
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    return cache


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (lambda model: model(torch.tensor([[300]])), "Token 300 is not in the vocabulary of 256"),
        (lambda model: model(torch.tensor([[3]]), output_attentions=True), "Attention weights are not kept"),
        (lambda model: model(torch.tensor([[3]]), attention_mask=torch.ones(2, 1)), r"must have the shape \(1, 1\)"),
        (lambda model: model(torch.tensor([[3]]), attention_mask=torch.ones(1, 1, 1, 1)), "must have the shape"),
        (lambda model: model(torch.tensor([[3]]), cache=_offloaded(model)), "DynamicCache of this kind does not serve"),
        (lambda model: model(torch.tensor([[3]]), cache=((),)), "tuple of this kind does not serve"),
        (
            lambda model: model(torch.tensor([[3]]), cache=DynamicCache(config=GPT2Config(n_layer=2))),
            "cache has 2 layers and the model 1",
        ),
        (
            lambda model: model(torch.tensor([[3, 4, 5]]), cache=StaticCache(model.config, max_cache_len=2)),
            "room for 2 tokens, and these are 3",
        ),
        (lambda model: model.activation_checkpointing_enable(), "leave gradient_checkpointing out"),
        (lambda model: model.resize_token_embeddings(300), "vocabulary of 256 tokens is fixed"),
        (lambda model: DEQConfig(width=33), "width must be a multiple"),
        (lambda model: DEQConfig(depth="deep"), "equilibrium, untied, tied"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(asked: Any, says: str):
    with pytest.raises(UsageError, match=says) as error:
        asked(model_of())
    assert "\n" not in str(error.value)


def test_folders_of_other_models_or_parts_are_refused(folder: Path, tmp_path: Path):
    GPT2Config(n_layer=1, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="type 'gpt2' and architecture 'GPT2LMHeadModel', not of 'deq'"):
        DEQForCausalLM.from_pretrained(tmp_path / "gpt2")
    values = json.loads((folder / "config.json").read_text())
    for changed, says in (
        ({"width": 64}, "sizes differ"),
        ({"depth": "untied"}, "missing: model.depth.blocks.0"),
        ({"warm_start": True}, "missing: model.guess.weight"),
        ({"vocabulary": 255}, "sizes differ"),
        ({"architectures": ["Other"]}, "architecture 'Other'"),
    ):
        (folder / "config.json").write_text(json.dumps(values | changed))
        with pytest.raises(UsageError, match=says):
            AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer = json.loads(with_padding(of_bytes().to_json()))
    tokenizer["added_tokens"].append({"id": 256, "content": "<eos>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="has 257 tokens and the model only 256"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert type(AutoConfig.from_pretrained(folder)) is DEQConfig


def test_the_page_on_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[1] / "docs" / "hugging-face.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    (tmp_path / "page_on_transformers.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        done = importlib.import_module("page_on_transformers")
    assert done.texts[0].startswith("Once upon a time")
    assert len(done.per_token) == 20
    assert done.losses[-1] < done.losses[0]
    monkeypatch.delitem(sys.modules, "page_on_transformers")
