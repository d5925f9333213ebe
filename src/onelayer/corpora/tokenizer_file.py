"""The `tokenizer.json` of the `tokenizers` library: its letters for bytes, and what a model has to know of it."""

from __future__ import annotations

import json
from typing import Any

from onelayer.errors import UsageError
from onelayer.models.configuration import BYTES

PADDING = "\0"
ROLES = {
    PADDING: "pad_token",
    "<pad>": "pad_token",
    "<bos>": "bos_token",
    "<eos>": "eos_token",
    "<|endoftext|>": "eos_token",
    "<unk>": "unk_token",
}
"""What the special tokens of a `tokenizer.json` are for, by their names."""


def _alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself, where it can be seen."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(BYTES) if byte not in seen]
    return [chr(byte if byte in seen else BYTES + unseen.index(byte)) for byte in range(BYTES)]


ALPHABET = _alphabet()


def with_padding(tokenizer_json: str) -> str:
    """A byte-level tokenizer whose token for the byte 0 is its padding token, unless it has a padding token already.

    No text holds that byte, and a model has no token to spare that it was not trained with. Text that holds it all the
    same comes back as it was, except by `skip_special_tokens=True`, which leaves it out.

    >>> from onelayer.corpora.tokenizer import of_bytes
    >>> special_ids(with_padding(of_bytes().to_json()))
    {'pad_token_id': 0}

    Args:
        tokenizer_json: the content of the file.

    Returns:
        The content with a padding token; as it was where it is no byte-level tokenizer or merges that byte.
    """
    content = json.loads(tokenizer_json)
    model, letter = content["model"], ALPHABET[0]
    merged = any(letter in "".join(merge) for merge in model.get("merges") or [])
    if "pad_token" in _special(tokenizer_json) or merged or letter not in model["vocab"] or model.get("type") != "BPE":
        return tokenizer_json
    # The padding token is found in a text before bytes become letters, so it stands in the vocabulary as itself.
    model["vocab"] = {PADDING if token == letter else token: n for token, n in model["vocab"].items()}
    padding = {"id": model["vocab"][PADDING], "content": PADDING, "special": True}
    padding |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [padding, *(content.get("added_tokens") or [])]
    return json.dumps(content, ensure_ascii=False)


def without_padding(tokenizer_json: str) -> str:
    """What `with_padding` was given.

    >>> from onelayer.corpora.tokenizer import of_bytes
    >>> json.loads(without_padding(with_padding(of_bytes().to_json())))["added_tokens"]
    []
    """
    content = json.loads(tokenizer_json)
    added = content.get("added_tokens") or []
    rest = [token for token in added if token["content"] != PADDING]
    if len(rest) == len(added):
        return tokenizer_json
    content["added_tokens"] = rest
    vocabulary = content["model"]["vocab"].items()
    content["model"]["vocab"] = {ALPHABET[0] if token == PADDING else token: n for token, n in vocabulary}
    return json.dumps(content, ensure_ascii=False)


def tokenizer_size(tokenizer_json: str) -> int:
    """One more than the largest token of a `tokenizer.json`.

    >>> from onelayer.corpora.tokenizer import of_bytes
    >>> tokenizer_size(of_bytes().to_json())
    256

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    content = json.loads(tokenizer_json)
    vocabulary = content["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=-1)


def tokenizer_config(tokenizer_json: str, context: int) -> dict[str, Any]:
    """What stands beside a `tokenizer.json` so that `transformers` uses it as a language model needs it.

    >>> from onelayer.corpora.tokenizer import of_bytes
    >>> tokenizer_config(of_bytes().to_json(), 128)["padding_side"]
    'left'

    Args:
        tokenizer_json: the content of the file.
        context: tokens of a training window, beyond which `transformers` warns.

    Returns:
        The values of `tokenizer_config.json`.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # the next token follows the last one
        "clean_up_tokenization_spaces": False,
    } | {role: content for role, (content, _) in _special(tokenizer_json).items()}


def special_ids(tokenizer_json: str) -> dict[str, int]:
    """The special tokens of a `tokenizer.json` under the names that generation knows them by.

    >>> from onelayer.corpora.tokenizer import of_bytes
    >>> special_ids(with_padding(of_bytes().to_json()))
    {'pad_token_id': 0}
    """
    return {f"{role}_id": token for role, (_, token) in _special(tokenizer_json).items() if role != "unk_token"}


def check_size(tokenizer_json: str, vocabulary: int, origin: str) -> None:
    """Makes sure that a tokenizer has no token that a model has not.

    >>> from onelayer.corpora.tokenizer import of_bytes
    >>> check_size(of_bytes().to_json(), 256, "tokenizer.json")

    Args:
        tokenizer_json: the content of the file.
        vocabulary: number of tokens of the model.
        origin: of the content, for the error.

    Raises:
        UsageError: it has, or it is damaged.
    """
    try:
        size = tokenizer_size(tokenizer_json)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{origin} is damaged ({type(error).__name__}: {error}): restore it.") from None
    if size > vocabulary:
        raise UsageError(
            f"{origin} has {size} tokens and the model only {vocabulary}: take the tokenizer that it was trained with."
        )


def _special(tokenizer_json: str) -> dict[str, tuple[str, int]]:
    added = json.loads(tokenizer_json).get("added_tokens") or []
    special = [token for token in added if token.get("special") and token["content"] in ROLES]
    return {ROLES[token["content"]]: (token["content"], token["id"]) for token in special}
