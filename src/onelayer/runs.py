"""The run folder: where a run keeps its configuration, its metrics and its weights.

config.json                 the resolved configuration, the command, the data and their fingerprint
tokens/                     the text as tokens, unless the data were tokens already
metrics.jsonl               one line for each training step and each validation
model/                      the weights at the last save, in the form that transformers reads
checkpoints/                what resuming needs, the last two saves
evaluation.json             what the finished model does on the validation text
report.html                 all of it to look at
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelayer import corpora, pretrained
from onelayer.corpora import tokenizer
from onelayer.corpora.hub_data import PREFIX
from onelayer.corpora.prepared import Corpus, is_prepared
from onelayer.corpora.tokenizer import Tokenizer
from onelayer.errors import UsageError
from onelayer.files import write_bytes, written
from onelayer.model_card import Measured, card
from onelayer.models.language_model import LanguageModel
from onelayer.presets import RunConfig, from_dict, to_dict

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def create(run: Path, config: RunConfig, command: str) -> Corpus:
    """Makes a run folder, with the text as tokens and `config.json` in it; nothing of it stays where that fails.

    >>> corpus = create(Path("runs/first"), preset("small"), "onelayer train")  # doctest: +SKIP

    Raises:
        UsageError: there is something at that path already, or the data will not do.
    """
    if run.is_dir() and [path.name for path in run.iterdir()] == ["tokens"]:  # killed while it read the text
        shutil.rmtree(run / "tokens")
    new_folder(run, f"go on with it by --resume {run}, or name another folder")
    try:
        prepared = config.data is not None and is_prepared(Path(config.data))
        corpus = corpora.prepare(config.data, run / "tokens", None if prepared else config.model.vocabulary)
        corpora.require(corpus, config.model)
        data = {
            "path": config.data,
            "name": corpus.name,
            "train_bytes": corpus.train_bytes,
            "validation_bytes": corpus.validation_bytes,
            "fingerprint": corpus.fingerprint,
            "tokenizer": corpus.tokenizer.fingerprint,
        }
        with written(run / "config.json", "make room on the disk, or name another folder"):
            write_json(run / "config.json", to_dict(config) | {"command": command, "data": data})
    except BaseException:
        shutil.rmtree(run / "tokens", ignore_errors=True)
        with suppress(OSError):
            run.rmdir()
        raise
    return corpus


def read_corpus(run: Path) -> Corpus:
    """The text of a run, in its own folder or where it was prepared before.

    >>> read_corpus(Path("runs/first")).describe()                              # doctest: +SKIP

    Raises:
        UsageError: this is no run folder, or the tokens are gone or damaged.
    """
    config, _ = read_config(run)
    own = run / "tokens"
    if not own.is_dir() and (config.data is None or not is_prepared(Path(config.data))):
        if config.data is not None and not config.data.startswith(PREFIX) and not Path(config.data).exists():
            raise UsageError(f"The tokens of {run} and the data {config.data} are gone: restore one of the two.")
        of_text = [] if config.data is None else ["--data", config.data]
        by = ["--tokenizer", str(run / "model" / "tokenizer.json"), "--out", str(own)]
        command = shlex.join(["onelayer", "tokenize", *of_text, *by])
        raise UsageError(f"The tokens of {run} are gone: make them anew by {command}.")
    return _of_the_same_tokens(run, corpora.open_tokens(own if config.data is None or own.is_dir() else config.data))


def same_corpus(run: Path, config: RunConfig) -> Corpus:
    """The text of a run that goes on, once it is clear that it is what the configuration names.

    >>> corpus = same_corpus(Path("runs/first"), config)                        # doctest: +SKIP

    Raises:
        UsageError: they are not, or the tokens are gone or damaged.
    """
    before, fingerprint = read_config(run)
    if config.data != before.data and config.data is not None and is_prepared(Path(config.data)):
        corpus = _of_the_same_tokens(run, corpora.open_tokens(config.data))  # it may lie elsewhere by now
    else:
        corpus = read_corpus(run)
    name, given = corpus.name, corpus.fingerprint
    if config.data not in (before.data, str(corpus.folder)):
        with tempfile.TemporaryDirectory() as folder:
            other = corpora.prepare(config.data, Path(folder, "tokens"), tokenizer=corpus.tokenizer)
            name, given = other.name, other.fingerprint
    if not fingerprint == given == corpus.fingerprint:
        raise UsageError(f"{run} was trained on other data than {name}: give the same data, or start a new run.")
    corpora.require(corpus, config.model)
    return corpus


def _of_the_same_tokens(run: Path, corpus: Corpus) -> Corpus:
    known = json.loads((run / "config.json").read_text())["data"].get("tokenizer")
    if known != corpus.tokenizer.fingerprint:
        raise UsageError(
            f"{run} was trained with another tokenizer than that of {corpus.folder}: give it tokens made by its own, "
            f"{run / 'model' / 'tokenizer.json'}."
        )
    return corpus


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes of this machine from training in a run folder, until the block or this process ends.

    >>> with locked(Path("runs/first")):                                        # doctest: +SKIP
    ...     train()

    Raises:
        UsageError: another process is training there, or nothing can be written there.
    """
    if fcntl is None:
        yield
        return
    with written(run / ".lock", "make room there, or make the folder one that you may write"):
        file = (run / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another process is training in {run}: wait until it ends, or stop it.") from None
        except OSError:
            pass  # a file system without locks
        yield


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
        if "model_type" in values:
            raise UsageError(f"this is the folder of a model, so name the run folder that it lies in, {run.parent}.")
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
        UsageError: this is no run folder, or its weights are missing, damaged or of another model.
    """
    config, _ = read_config(run)
    model = pretrained.read(run / "model")
    if model.config != config.model:
        raise UsageError(
            f"{run / 'model'} holds another model than {run / 'config.json'} says: restore the two together."
        )
    device = config.training.device if torch.cuda.is_available() else "cpu"
    return model.to(device), config


def load_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of the model of a run.

    >>> load_tokenizer(Path("runs/first")).encode(b"def ").tolist()             # doctest: +SKIP
    [100, 101, 102, 32]

    Raises:
        UsageError: it is missing or damaged.
    """
    document = pretrained.read_tokenizer(run / "model")
    if document is None:
        raise UsageError(f"{run / 'model'} has no tokenizer.json: restore the one that it was trained with.")
    return tokenizer.from_json(document)


def write_model(run: Path, config: RunConfig, weights: dict[str, Tensor], corpus: Corpus, step: int) -> None:
    """Writes the weights as a folder that `transformers` reads, `run/model`, with a card that says how far they are.

    >>> write_model(Path("runs/first"), config, model.state_dict(), corpus, step=100)    # doctest: +SKIP
    """
    pretrained.write(run / "model", config.model, weights, corpus.tokenizer.to_json())
    write_card(run, config, corpus, step, Measured())


def write_card(run: Path, config: RunConfig, corpus: Corpus, step: int, measured: Measured) -> None:
    """Writes the card of the model of a run.

    Args:
        run: its folder.
        config: of the run.
        corpus: its text.
        step: updates behind the weights.
        measured: on the validation text.
    """
    with torch.device("meta"):
        parameters = LanguageModel(config.model).parameter_counts()
    tokens = step * config.training.batch_size * config.model.context
    text = card(config.model, parameters, corpus.name, tokens, measured)
    with written(run / "model" / "README.md", f"make room on the disk, then go on by --resume {run}"):
        write_bytes(run / "model" / "README.md", text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file in one step.

    >>> write_json(Path("evaluation.json"), {"bits_per_byte": 2.1})             # doctest: +SKIP
    """
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())
