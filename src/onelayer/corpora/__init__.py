"""Corpora: text turned into tokens on disk, split into train and validation, and the windows that a model is given."""

from onelayer.corpora.prepared import Corpus, is_prepared, open_tokens
from onelayer.corpora.preparing import prepare, require, resolved

__all__ = ["Corpus", "is_prepared", "open_tokens", "prepare", "require", "resolved"]
