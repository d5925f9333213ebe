"""The run folder: where a run keeps its configuration, its metrics and its weights.

config.json                 the resolved configuration, the command, the data and their fingerprint
tokens/                     the text as tokens, unless the data were tokens already
metrics.jsonl               one line for each training step and each validation
model.safetensors           the weights at the last save
checkpoints/                what resuming needs, the last two saves
evaluation.json             what the finished model does on the validation text
report.html                 all of it to look at
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from onelayer import checkpoints, corpora
from onelayer.checkpoints import Checkpoint
from onelayer.errors import UsageError
from onelayer.models.language_model import LanguageModel
from onelayer.prepared import Corpus
from onelayer.presets import RunConfig, from_dict, to_dict


def create(run: Path, config: RunConfig, command: str) -> Corpus:
    """Makes a run folder, with the text as tokens and `config.json` in it; nothing of it stays where that fails.

    >>> corpus = create(Path("runs/first"), preset("small"), "onelayer train")  # doctest: +SKIP

    Raises:
        UsageError: there is something at that path already, or the data will not do.
    """
    new_folder(run, f"go on with it by --resume {run}, or name another folder")
    try:
        corpus = corpora.prepare(config.data, run / "tokens")
        corpora.require(corpus, config.model)
    except BaseException:
        shutil.rmtree(run / "tokens", ignore_errors=True)
        with suppress(OSError):
            run.rmdir()
        raise
    data = {
        "path": config.data,
        "name": corpus.name,
        "train_bytes": corpus.train_bytes,
        "validation_bytes": corpus.validation_bytes,
        "fingerprint": corpus.fingerprint,
        "tokenizer": corpus.tokenizer.fingerprint,
    }
    write_json(run / "config.json", to_dict(config) | {"command": command, "data": data})
    return corpus


def read_corpus(run: Path) -> Corpus:
    """The text of a run, in its own folder or where it was prepared before.

    >>> read_corpus(Path("runs/first")).describe()                              # doctest: +SKIP

    Raises:
        UsageError: this is no run folder, or the tokens are gone or damaged.
    """
    config, _ = read_config(run)
    own = run / "tokens"
    return corpora.open_tokens(own if config.data is None or own.is_dir() else config.data)


def same_corpus(run: Path, config: RunConfig) -> Corpus:
    """The text of a run that goes on, once it is clear that it is what the configuration names.

    >>> corpus = same_corpus(Path("runs/first"), config)                        # doctest: +SKIP

    Raises:
        UsageError: they are not, or the tokens are gone or damaged.
    """
    before, fingerprint = read_config(run)
    corpus = read_corpus(run)
    name, given = corpus.name, corpus.fingerprint
    if config.data != before.data:
        with tempfile.TemporaryDirectory() as folder:
            other = corpora.prepare(config.data, Path(folder, "tokens"), tokenizer=corpus.tokenizer)
            name, given = other.name, other.fingerprint
    if not fingerprint == given == corpus.fingerprint:
        raise UsageError(f"{run} was trained on other data than {name}: give the same data, or start a new run.")
    corpora.require(corpus, config.model)
    return corpus


def new_folder(path: Path, remedy: str) -> None:
    """Makes a folder for what is going to be written; an empty one will do.

    >>> new_folder(Path("proof"), "name another folder")

    Args:
        path: of the folder.
        remedy: what to do where there is something already, the end of a sentence.

    Raises:
        UsageError: there is something at that path already, or it cannot be made.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            raise UsageError(f"{path} exists already and is left as it is: {remedy}.") from None
    except OSError as error:
        raise UsageError(f"The folder {path} cannot be made ({error.strerror}): name another one.") from None


def read_config(run: Path) -> tuple[RunConfig, str]:
    """The configuration of a run, and the fingerprint of the data that it was started on.

    >>> config, fingerprint = read_config(Path("runs/first"))                   # doctest: +SKIP

    Raises:
        UsageError: this is no run folder, or its `config.json` is damaged.
    """
    try:
        values = json.loads((run / "config.json").read_text())
        return from_dict(values), str(values["data"]["fingerprint"])
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run} is not a run folder, it has no config.json: name one made by onelayer train."
        ) from None
    except UsageError as error:
        raise UsageError(f"{run / 'config.json'}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run / 'config.json'} is damaged ({error}): restore it, or train anew.") from None


def load_model(run: Path) -> tuple[LanguageModel, RunConfig]:
    """The model of a run with the weights of its last save, in evaluation mode, on its training's device if there.

    >>> model, config = load_model(Path("runs/first"))                          # doctest: +SKIP

    Raises:
        UsageError: this is no run folder, or its weights are missing or damaged.
    """
    config, _ = read_config(run)
    model = LanguageModel(config.model)
    load_weights(model, checkpoints.read(run / "model.safetensors"), run)
    device = config.training.device if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), config


def load_weights(model: LanguageModel, checkpoint: Checkpoint, run: Path) -> None:
    """Puts the `model.*` tensors of a checkpoint into the model.

    Raises:
        UsageError: they are of another model.
    """
    weights = {
        name.removeprefix("model."): tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UsageError(f"The weights in {run} do not fit the model in its config.json: restore the two.") from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file in one step.

    >>> write_json(Path("evaluation.json"), {"bits_per_byte": 2.1})             # doctest: +SKIP
    """
    checkpoints.write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


class Metrics:
    """`metrics.jsonl`: a line is on disk before the next step starts, and half a line is never read.

    >>> metrics = Metrics(Path("runs/first"), after_step=0)                     # doctest: +SKIP
    >>> metrics.write({"kind": "train", "step": 1})                             # doctest: +SKIP

    Args:
        run: the run folder.
        after_step: lines of later steps are dropped, because the run goes on from there.
    """

    def __init__(self, run: Path, after_step: int) -> None:
        path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= after_step]
        checkpoints.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that was cut short when the run was killed is left out.

    >>> [line["bits_per_byte"] for line in read_metrics(Path("runs/first"))]    # doctest: +SKIP
    """
    path = run / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
