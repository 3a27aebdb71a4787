"""What sentence-transformers does behind the tokens: one vector of each sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdq.core.errors import InputError
from qdq.frontend.huggingface.folder import Pooling
from qdq.frontend.pytorch.libraries import torch_here

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "Tanh": lambda x: x.tanh(),
    "Identity": lambda x: x,
    "ReLU": lambda x: x.relu(),
    "GELU": lambda x: torch_here().nn.functional.gelu(x),
}
TINY = 1e-9


def pooled(how: Pooling) -> tuple[tuple[Any, ...], Callable[[Any, Any], Any]]:
    """The linear layers, and a function of (batch, tokens, width) and the mask to (batch, width).

    Raises:
        InputError: a linear layer's files are missing, or its activation is not known.
    """
    read = [_dense(place) for place in how.dense]

    def pool(tokens: Any, mask: Any) -> Any:
        kept = mask.to(tokens.dtype).unsqueeze(-1)
        found = torch_here().cat([_MODES[mode](tokens, kept) for mode in how.modes], -1)
        for layer, activation in read:
            found = activation(layer(found))
        return torch_here().nn.functional.normalize(found, dim=-1) if how.normalize else found

    return tuple(layer for layer, _ in read), pool


def _mean(tokens: Any, kept: Any) -> Any:
    return (tokens * kept).sum(1) / kept.sum(1).clamp(min=TINY)


def _weighted(tokens: Any, kept: Any) -> Any:
    places = torch_here().arange(1, tokens.shape[1] + 1, dtype=tokens.dtype, device=tokens.device)[None, :, None]
    return _mean(tokens, kept * places)


def _last(tokens: Any, kept: Any) -> Any:
    places = torch_here().arange(tokens.shape[1], device=tokens.device)[None, :, None]
    last = (kept * places).amax(1, keepdim=True)
    return (tokens * (places == last)).sum(1)


_MODES: dict[str, Callable[[Any, Any], Any]] = {
    "cls_token": lambda tokens, kept: tokens[:, 0],
    "max_tokens": lambda tokens, kept: (
        torch_here().where(kept > 0, tokens, torch_here().full_like(tokens, -1e9)).amax(1)
    ),
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": lambda tokens, kept: (tokens * kept).sum(1) / kept.sum(1).clamp(min=TINY).sqrt(),
    "weightedmean_tokens": _weighted,
    "lasttoken": _last,
}


def _dense(place: Path) -> tuple[Any, Callable[[Any], Any]]:
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        layer = torch_here().nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        if (place / "model.safetensors").is_file():
            from safetensors.torch import load_file

            weights = load_file(place / "model.safetensors")
        else:
            weights = torch_here().load(place / "pytorch_model.bin", map_location="cpu", weights_only=True)
        layer.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()})
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"Cannot read the linear layer in {place}: {error}. Fetch or save the folder again.") from None
    name = str(config.get("activation_function", "Identity")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise InputError(f"The linear layer in {place} has the activation {name!r}; known: {', '.join(ACTIVATIONS)}.")
    return layer.requires_grad_(False), ACTIVATIONS[name]
