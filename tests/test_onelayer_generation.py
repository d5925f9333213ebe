"""Generation: what the cache gives is what the whole window gives, for every model, in any batch, chunked or not."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.generation import generate
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.readers import CachedReader, WholeReader

CONTEXT = 12
MODELS: dict[str, dict[str, Any]] = {
    "post": {},
    "subtracted": {"block": "subtracted"},
    "relative": {"positions": "relative"},
    "trellisnet": {"architecture": "trellisnet", "kernel": 3},
    "tied": {"depth": "tied", "layers": 3},
    "untied": {"depth": "untied", "layers": 3, "positions": "relative"},
    "untied trellisnet": {"architecture": "trellisnet", "depth": "untied", "layers": 3},
}
EQUILIBRIA = ("post", "subtracted", "relative", "trellisnet")


def model_of(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    values = {"width": 32, "heads": 2, "context": CONTEXT, "rtol": 1e-10, "eval_max_steps": 200} | MODELS[kind]
    return LanguageModel(ModelConfig(**values | changes)).to(dtype).eval()


def prompts_of(count: int, longest: int = 9) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]


def texts(drawn: Sequence[list[int]] | Any) -> list[list[int]]:
    return [list(text) for text in zip(*drawn, strict=True)]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_the_same_with_and_without_cache(kind: str):
    model, prompts = model_of(kind), prompts_of(50)
    assert max(map(len, prompts)) + 7 > CONTEXT  # some texts outgrow their context and begin anew
    cached = generate(model, prompts, 7, temperature=0)
    found = texts(cached)
    assert found == texts(generate(model, prompts, 7, temperature=0, cache=False))
    assert len({tuple(text) for text in found}) > 25  # texts differ, so that agreement says something
    assert cached.report.complaint() is None


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_logits_do_not_depend_on_chunks(kind: str, chunk: int):
    model, prompts = model_of(kind), prompts_of(4)
    with torch.no_grad():
        whole = WholeReader(model).restart(prompts)[-1].logits
        parts = CachedReader(model, chunk).restart(prompts)
        assert whole is not None
        assert len(parts) == math.ceil(max(map(len, prompts)) / chunk)
        found = torch.cat([part.logits for part in parts if part.logits is not None], dim=1)
    for row, prompt in enumerate(prompts):
        real = slice(-len(prompt), None)
        torch.testing.assert_close(found[row, real], whole[row, real], rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_of_different_lengths_is_its_prompts_one_by_one(kind: str):
    model, prompts = model_of(kind), prompts_of(4, longest=CONTEXT)
    together = texts(generate(model, prompts, 10, temperature=0.7, seed=5, chunk=4))
    alone = [texts(generate(model, [prompt], 10, 0.7, 5 + k))[0] for k, prompt in enumerate(prompts)]
    assert together == alone
    with torch.no_grad():
        batch, single = CachedReader(model), [CachedReader(model) for _ in prompts]
        batch.restart(prompts)
        logits = [batch.advance([7] * 4).logits]
        for reader, prompt in zip(single, prompts, strict=True):
            reader.restart([prompt])
            logits.append(reader.advance([7]).logits)
    first, *others = (part for part in logits if part is not None)
    torch.testing.assert_close(first, torch.cat(others), rtol=0, atol=1e-8)


@pytest.mark.parametrize("cache", [True, False])
def test_text_beyond_the_context_is_predicted_from_its_last_half(cache: bool):
    model, (prompt,) = model_of("post"), prompts_of(1, longest=4)
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda model, tokens, output: seen.append(output.logits[0, -1]))
    text = [*prompt, *texts(generate(model, [prompt], 2 * CONTEXT, cache=cache))[0]]
    hook.remove()
    begin = 0
    with torch.no_grad():
        for end, logits in enumerate(seen, start=len(prompt)):
            if end - begin > CONTEXT:
                begin = end - CONTEXT // 2
            expected = model(torch.tensor([text[begin:end]])).logits
            torch.testing.assert_close(logits, expected[0, -1], rtol=0, atol=1e-8)
    assert begin > CONTEXT  # it began anew more than once
    assert len(seen) == 2 * CONTEXT


@pytest.mark.parametrize("kind", EQUILIBRIA)
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_cached_logits_agree_to_ten_times_the_tolerance_in_float32(kind: str, rtol: float):
    # Relative to the logits of the whole window, as the tolerance is relative to the states of the whole window.
    model = model_of(kind, torch.float32, rtol=rtol, context=32)
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens).logits
        reader = CachedReader(model)
        outputs = [*reader.restart(tokens[:, :1].tolist()), *(reader.advance(t.tolist()) for t in tokens[:, 1:].T)]
    assert all(bool(output.solution.converged.all()) for output in outputs)
    cached = torch.cat([output.logits for output in outputs], dim=1)
    apart = (cached - whole).norm(dim=(1, 2)) / whole.norm(dim=(1, 2))
    assert (apart <= 10 * rtol).all()
    assert (apart > 0).any()  # two ways to the same place, not one


@pytest.mark.parametrize("kind", ["post", "relative", "trellisnet"])
def test_a_start_at_the_token_before_gives_the_same_text(kind: str):
    model, prompts = model_of(kind), prompts_of(4)
    own, previous = (generate(model, prompts, 7, temperature=0, start=start) for start in ("own", "previous"))
    assert texts(own) == texts(previous)
    assert own.report.residual != previous.report.residual  # the other start was another path
    warm = generate(model, prompts, 7, temperature=0, start="previous", cache=False)
    cold = generate(model, prompts, 7, temperature=0, cache=False)
    assert texts(warm) == texts(cold)
    assert warm.report.evaluations_per_token < cold.report.evaluations_per_token


def test_one_slot_whatever_the_depth():
    bytes_of = {}
    for kind in MODELS:
        drawn = generate(model_of(kind), prompts_of(2), 3)
        list(drawn)
        bytes_of[kind] = drawn.report.cache_bytes
    slot = 2 * 2 * CONTEXT * 32 * 8  # keys and values, two texts, float64
    assert bytes_of["post"] == bytes_of["subtracted"] == bytes_of["relative"] == slot
    assert bytes_of["tied"] == bytes_of["untied"] == 3 * slot


def test_a_sample_that_is_not_finite_does_not_disturb_the_others():
    model, prompts = model_of("post"), prompts_of(4)
    bad = 9
    prompts = [[token if token != bad else 0 for token in prompt] for prompt in prompts]
    with torch.no_grad():
        model.embedding.weight[bad] = torch.nan  # the text that holds it, and its logit everywhere
    alone = generate(model, prompts, 3, temperature=0, on_failure="ignore")
    drawn = generate(model, [[*prompts[0], bad], *prompts], 3, temperature=0, on_failure="ignore")
    assert texts(drawn)[1:] == texts(alone)
    # The logit of that token in every draw, and each solve of the bad text.
    assert drawn.report.not_finite == 5 * 3 + 3
    assert drawn.report.at_cap == 0
    assert "NaN" in str(drawn.report.complaint())


def test_what_did_not_converge_is_told_once_and_counted():
    model, prompts = model_of("post", eval_max_steps=3), prompts_of(2)
    drawn = generate(model, prompts, 4, temperature=0)
    with pytest.warns(eq.ConvergenceWarning, match="8 of 8 solves ended without meeting the tolerance") as told:
        list(drawn)
    assert len(told) == 1
    assert (drawn.report.at_cap, drawn.report.solves, drawn.report.drawn) == (8, 8, 4)
    assert drawn.report.residual > 1e-10
    assert drawn.report.evaluations == [3, 3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(generate(model, prompts, 4, on_failure="ignore"))


def test_generation_leaves_the_model_and_the_random_numbers_as_they_are():
    model = model_of("post", torch.float32, dropout=0.5, rtol=1e-4).train()
    state = torch.get_rng_state()
    first, second = (texts(generate(model, [[1, 2]], 6, seed=3)) for _ in range(2))
    assert first == second  # dropout is off
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).losses.sum().backward()  # it can still be trained


@pytest.mark.parametrize(
    ("prompts", "values", "says"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "empty"),
        ([[1] * 13], {}, "13 bytes and the context only 12"),
        ([[1]], {"count": 0}, "at least 1"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"seed": -1}, "seed"),
        ([[1]], {"chunk": 0}, "chunk"),
        ([[999]], {}, "not in the vocabulary"),
    ],
)
def test_what_makes_no_sense_is_refused(prompts: list[list[int]], values: dict[str, Any], says: str):
    with pytest.raises(UsageError, match=says):
        list(generate(model_of("tied"), prompts, **({"count": 3} | values)))
