"""The stock caches of `transformers` as the past of a language model."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from onelayer.errors import UsageError
from onelayer.models.window import Slot


def past_of(cache: Cache | None, slots: int) -> tuple[tuple[Slot, ...] | None, int]:
    """What a cache holds, without changing it: a solve attends to it at every evaluation and adds to it once.

    >>> past_of(None, 1)
    (None, 0)

    Args:
        cache: dynamic or static, with a layer for each slot.
        slots: of the model.

    Returns:
        Keys and values of each slot, `(batch, heads, tokens, size)`, `None` where there are no tokens yet; and their
        number.

    Raises:
        UsageError: the cache is of another kind, or of a model with another number of slots.
    """
    if cache is None:
        return None, 0
    layers: list[Any] = getattr(cache, "layers", [None])
    # Their subclasses forget, round or move what they hold, so that reading them directly would be wrong.
    stock = all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
    if not stock or cache.offloading:
        raise UsageError(
            f"A {type(cache).__name__} of this kind does not serve: take the dynamic cache, or cache_implementation="
            '"static".'
        )
    length = int(cache.get_seq_length())
    if layers and len(layers) != slots:
        raise UsageError(
            f"The cache has {len(layers)} layers and the model {slots}: make it by DynamicCache(config=model.config)."
        )
    if length == 0:
        return None, 0
    # Of a static cache the positions in use alone, so that attention costs what it would in a dynamic one.
    return tuple((layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in layers), length


def commit(cache: Cache, left: tuple[Slot, ...]) -> None:
    """Adds what tokens left, once their solve is done.

    >>> from transformers import DynamicCache
    >>> import torch
    >>> cache = DynamicCache()
    >>> commit(cache, ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)),))
    >>> cache.get_seq_length()
    3

    Raises:
        UsageError: a static cache has no room for them.
    """
    room, length = cache.get_max_length() if cache.layers else -1, int(cache.get_seq_length())
    time = left[0][0].shape[2]
    if 0 <= room < length + time:
        raise UsageError(f"The static cache has room for {room} tokens, and these are {length + time}: make it longer.")
    for slot, (keys, values) in enumerate(left):
        cache.update(keys, values, slot)
