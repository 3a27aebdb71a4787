"""Keys and values of earlier tokens as plain tensors, named as Optimum names them, and transformers' caches of them.

past_key_values.N.key in, present.N.key out: (batch, heads, tokens, head size); of an encoder-decoder
past_key_values.N.decoder.key and past_key_values.N.encoder.key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdq.core.errors import InputError

PAST, PRESENT = "past_key_values", "present"
KINDS = ("key", "value")


def past_names(layers: int, sides: Sequence[str] = ("",)) -> list[str]:
    """Names of the inputs: of each layer, side ('' or 'decoder', 'encoder') and kind."""
    return [
        ".".join(filter(None, (PAST, str(layer), side, kind)))
        for layer in range(layers)
        for side in sides
        for kind in KINDS
    ]


def present_name(past: str) -> str:
    """The output that is the next step's input of this name."""
    return past.replace(PAST, PRESENT, 1)


def cache_of(tensors: Mapping[str, Any], layers: int) -> Any:
    """transformers' cache that holds these keys and values."""
    from transformers import DynamicCache, EncoderDecoderCache

    def side(name: str) -> Any:
        made = DynamicCache()
        for layer in range(layers):
            key, value = (tensors[".".join(filter(None, (PAST, str(layer), name, kind)))] for kind in KINDS)
            made.update(key, value, layer)
        return made

    if any(".decoder." in name for name in tensors):
        return EncoderDecoderCache(side("decoder"), side("encoder"))
    return side("")


def empty_cache(*, both: bool) -> Any:
    """A cache to be filled; `both` of an encoder-decoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()


def tensors_of(cache: Any, *, sides: Sequence[str]) -> dict[str, Any]:
    """Name of a `past_names` -> tensor, of what a cache holds.

    Raises:
        InputError: the model keeps something else than keys and values of every token.
    """
    found = {}
    for side in sides:
        part = (
            getattr(cache, {"decoder": "self_attention_cache", "encoder": "cross_attention_cache"}[side])
            if side
            else cache
        )
        for layer, pair in enumerate(_layers(part)):
            for kind, tensor in zip(KINDS, pair, strict=True):
                if getattr(tensor, "ndim", 0) != 4:
                    raise InputError(
                        f"Layer {layer} keeps no keys and values as (batch, heads, tokens, head size), and no other "
                        "state can be exported. Give --task text-generation, without a cache."
                    )
                found[".".join(filter(None, (PAST, str(layer), side, kind)))] = tensor
    return found


def _layers(cache: Any) -> list[tuple[Any, Any]]:
    if hasattr(cache, "layers"):
        return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return list(zip(getattr(cache, "key_cache", ()), getattr(cache, "value_cache", ()), strict=True))
