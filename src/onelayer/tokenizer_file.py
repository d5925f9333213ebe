"""The `tokenizer.json` of the `tokenizers` library: that of bytes, and what a model has to know of any."""

from __future__ import annotations

import json
from typing import Any

from onelayer.errors import UsageError
from onelayer.models.configuration import BYTES

PADDING = "\0"  # no text holds it, and a model of 256 bytes has no token to spare
ROLES = {
    PADDING: "pad_token",
    "<pad>": "pad_token",
    "<bos>": "bos_token",
    "<eos>": "eos_token",
    "<|endoftext|>": "eos_token",
    "<unk>": "unk_token",
}
"""What the special tokens of a `tokenizer.json` are for, by their names."""


def byte_tokenizer_json() -> str:
    """The `tokenizer.json` of the tokens that are bytes: token n is the byte n, so that any text comes back as it was.

    Byte 0 is the padding token, since no text holds it and a model of 256 bytes has no token to spare. Decoding with
    `skip_special_tokens=True` leaves it out.

    >>> json.loads(byte_tokenizer_json())["model"]["vocab"]["A"]
    65

    Returns:
        JSON for the `tokenizers` library: byte-level pre-tokens, a vocabulary of 256 tokens and no merges.
    """
    vocabulary = {_letter(byte): byte for byte in range(1, BYTES)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    padding = {"id": 0, "content": PADDING, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                padding | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False},
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # The padding token is found in the text before bytes become letters, so it stands under its own name.
                "vocab": {PADDING: 0} | vocabulary,
                "merges": [],
            },
        },
        ensure_ascii=False,
    )


def tokenizer_size(tokenizer_json: str) -> int:
    """One more than the largest token of a `tokenizer.json`.

    >>> tokenizer_size(byte_tokenizer_json())
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

    >>> tokenizer_config(byte_tokenizer_json(), 128)["padding_side"]
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

    >>> special_ids(byte_tokenizer_json())
    {'pad_token_id': 0}
    """
    return {f"{role}_id": token for role, (_, token) in _special(tokenizer_json).items() if role != "unk_token"}


def check_size(tokenizer_json: str, vocabulary: int, origin: str) -> None:
    """Makes sure that a tokenizer has no token that a model has not.

    >>> check_size(byte_tokenizer_json(), 256, "tokenizer.json")

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


def _letter(byte: int) -> str:
    """The printable letter by which byte-level tokenizers write a byte, since GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(BYTES + sum(other not in printable for other in range(byte)))


def _special(tokenizer_json: str) -> dict[str, tuple[str, int]]:
    added = json.loads(tokenizer_json).get("added_tokens") or []
    special = [token for token in added if token.get("special") and token["content"] in ROLES]
    return {ROLES[token["content"]]: (token["content"], token["id"]) for token in special}
