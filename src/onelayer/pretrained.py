"""The folder that a model is published in: what `transformers` reads, written and read without it.

config.json                 the architecture, flat, under the names of `ModelConfig`
model.safetensors           the weights, each named `model.<name>`
tokenizer.json              of the `tokenizers` library, where there is one
tokenizer_config.json       how `transformers` is to use it
generation_config.json      its padding token and its like
README.md                   the model card

`onelayer.hf` makes such a folder a model of `transformers`; training saves one with every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from onelayer.corpora.tokenizer_file import check_size, special_ids, tokenizer_config, with_padding, without_padding
from onelayer.errors import UsageError
from onelayer.files import write_bytes
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel

MODEL_TYPE = "deq"
ARCHITECTURE = "DEQForCausalLM"
PREFIX = "model."


def write(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer_json: str | None = None,
    card: str | None = None,
) -> None:
    """Writes a model as `transformers` reads it; every file is replaced in one step, the weights last.

    >>> config = ModelConfig(width=16, heads=2)
    >>> write(Path("first"), config, LanguageModel(config).state_dict())
    >>> sorted(path.name for path in Path("first").iterdir())
    ['config.json', 'model.safetensors']

    Args:
        folder: made where it is missing.
        config: of the model.
        weights: as `LanguageModel.state_dict()` names them, on any device.
        tokenizer_json: the content of a `tokenizer.json`, see `onelayer.corpora.tokenizer_file`; byte 0 becomes its
            padding token where it has none; `None` leaves it out.
        card: the model card in Markdown, see `onelayer.model_card`; `None` leaves it out.

    Raises:
        UsageError: the tokenizer has more tokens than the model, or the folder cannot be written.
    """
    files: dict[str, str] = {}
    if tokenizer_json is not None:
        check_size(tokenizer_json, config.vocabulary, "The tokenizer")
        tokenizer_json = with_padding(tokenizer_json)
        files["tokenizer.json"] = tokenizer_json
        files["tokenizer_config.json"] = _dump(tokenizer_config(tokenizer_json, config.context))
        files["generation_config.json"] = _dump(special_ids(tokenizer_json))
    if card is not None:
        files["README.md"] = card
    tensors = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    dtype = str(tensors[f"{PREFIX}embedding.weight"].dtype).removeprefix("torch.")
    head = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": dtype}
    files["config.json"] = _dump(head | asdict(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_bytes(folder / name, text.encode())
        metadata = {"format": "pt", "sha256": _checksum(tensors)}
        write_bytes(folder / "model.safetensors", save(tensors, metadata))
    except OSError as error:
        raise UsageError(
            f"The model cannot be saved in {folder} ({error.strerror}): what was there is as it was, make room or name "
            "another folder."
        ) from None


def read(folder: Path) -> LanguageModel:
    """The model in a folder that `write` or `save_pretrained` made, in evaluation mode on the CPU, in its own dtype.

    >>> config = ModelConfig(width=16, heads=2)
    >>> write(Path("first"), config, LanguageModel(config).state_dict())
    >>> read(Path("first")).config == config
    True

    Args:
        folder: with at least `config.json` and the weights.

    Returns:
        The model. Nothing of the file is run, and no random number is drawn.

    Raises:
        UsageError: a file is missing or damaged, is of another kind of model, or does not fit the others.
    """
    config = read_config(folder)
    check_tokenizer(folder, config.vocabulary)
    weights = _read_weights(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError:
        raise UsageError(
            f"The weights in {folder} do not fit the model in its config.json: restore the two together."
        ) from None
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The configuration in such a folder.

    >>> read_config(Path("runs/first/model")).width                             # doctest: +SKIP
    128

    Raises:
        UsageError: it is missing or damaged, or of another kind of model.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} holds no model, it has no config.json: name a folder that has.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}): restore it.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged (it holds no names): restore it.")
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    if kind != MODEL_TYPE or ARCHITECTURE not in architectures:
        raise UsageError(
            f"{path} is of a model of type {kind!r} and architecture {', '.join(map(str, architectures))!r}, not of "
            f"{MODEL_TYPE!r} and {ARCHITECTURE!r}: name a folder saved by onelayer."
        )
    return model_config(values, str(path))


def model_config(values: Mapping[str, Any], origin: str) -> ModelConfig:
    """The `ModelConfig` among the values of a `config.json`, which holds others beside.

    >>> model_config({"width": 64, "heads": 2, "model_type": "deq"}, "config.json").width
    64

    Args:
        values: by name; what is missing is as `ModelConfig` has it.
        origin: of the values, for the error.

    Raises:
        UsageError: a value is not allowed, or not of the type it should be.
    """
    names = {field.name for field in fields(ModelConfig)}
    try:
        return ModelConfig(**{name: value for name, value in values.items() if name in names})
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from None
    except TypeError as error:
        raise UsageError(f"{origin} has a value of the wrong type ({error}): mend it.") from None


def read_tokenizer(folder: Path) -> str | None:
    """The tokenizer in such a folder as `write` was given it; `None` where there is none.

    >>> read_tokenizer(Path("runs/first/model")) is None                        # doctest: +SKIP
    False

    Raises:
        UsageError: its file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return without_padding(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}): restore it.") from None


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Makes sure that the tokenizer of a folder, if there is one, has no token that the model has not.

    >>> check_tokenizer(Path("."), 256)

    Raises:
        UsageError: it has, or its file is damaged.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is damaged ({error}): restore it.") from None
        check_size(content, vocabulary, str(path))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"  # of the parts that `save_pretrained` splits large models into
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {path.name}
        for name in sorted(names):
            path = folder / name
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
                part = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                expected = (file.metadata() or {}).get("sha256")
            if expected is not None and expected != _checksum(part):
                raise UsageError(f"The weights {path} are damaged, their checksum does not match: restore them.")
            tensors |= part
    except FileNotFoundError:
        raise UsageError(f"The weights {path} are missing: restore them, or name another folder.") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"The weights {path} are damaged ({error}): restore them.") from None
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
