"""Samples of decoders: what they read at a step, made by running the float model.

A language model with a cache: a prefill of what comes before a token gives the keys and values that it reads.
An encoder-decoder: its encoder's states of a sample, and the tokens that it writes by itself, each the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qdq.core.errors import InputError
from qdq.frontend.huggingface import caches
from qdq.frontend.huggingface.forms import Form, decoded
from qdq.frontend.huggingface.network import Network, cache_name
from qdq.frontend.huggingface.text import Ids
from qdq.frontend.pytorch.libraries import torch_here

WRITTEN = 32  # tokens that an encoder-decoder writes of a sample, at most
Sample = dict[str, np.ndarray]


def cached_steps(
    network: Network, form: Form, blocks: Sequence[Ids], *, past: int | None, seed: int
) -> Iterator[Sample]:
    """One step of each block: its token at a seeded place, with the keys and values of all before it.

    Args:
        network, form: of text-generation-with-past.
        blocks: (tokens,) each.
        past: tokens of the cache, of which the first are empty where there are fewer; None: as many as come before.
        seed: of the places.
    """
    name, rng = cache_name(network.model.forward), np.random.default_rng(seed)
    for ids in blocks:
        place = int(rng.integers(1, min(len(ids), past + 1 if past else len(ids))))
        cache = caches.empty_cache(both=False)
        with torch_here().no_grad():
            network.model(input_ids=torch_here().from_numpy(ids[None, :place]), use_cache=True, **{name: cache})
        held = {n: tensor.numpy() for n, tensor in caches.tensors_of(cache, sides=("",)).items()}
        yield _step(form, ids[place], place, held, past, {})


def written_steps(
    network: Network, form: Form, sources: Iterator[Sample], *, past: int | None, seed: int, most: int
) -> Iterator[Sample]:
    """What the decoder reads of each source: all its tokens, or with a cache one of them at a seeded place.

    Args:
        network, form: of a decoder of an encoder-decoder.
        sources: inputs of the encoder, with a batch axis of 1.
        past: as in `cached_steps`.
        seed: of the places.
        most: tokens that are written.
    """
    name, rng = cache_name(network.model.forward), np.random.default_rng(seed)
    for source in sources:
        given = {n: torch_here().from_numpy(a) for n, a in source.items()}
        mask = given.get("attention_mask") if network.main_input == "input_ids" else None
        with torch_here().no_grad():
            states = network.model.get_encoder()(**given, return_dict=True).last_hidden_state
            ids = _written(network, states, mask, name, most)
            more = {} if mask is None else {"encoder_attention_mask": mask.numpy()}
            if not network.wish.past:
                yield {"input_ids": ids[None, :-1], **more, "encoder_hidden_states": states.numpy()}
                continue
            place = int(rng.integers(1, min(len(ids), past + 1 if past else len(ids))))
            cache = caches.empty_cache(both=True)
            decoded(network, torch_here().from_numpy(ids[None, :place]), states, mask, **{name: cache})
        held = {n: t.numpy() for n, t in caches.tensors_of(cache, sides=("decoder", "encoder")).items()}
        yield _step(form, ids[place], place, held, past, more)


def _step(form: Form, token: Any, place: int, held: Sample, past: int | None, more: Sample) -> Sample:
    """The inputs of one step: a token behind `place` others."""
    empty = 0 if past is None else past - place
    front = ((0, 0), (0, 0), (empty, 0), (0, 0))
    made = {
        "input_ids": np.asarray([[token]], np.int64),
        "attention_mask": np.pad(np.ones((1, place + 1), np.int64), ((0, 0), (empty, 0))),
        "position_ids": np.asarray([[place]], np.int64),
        **more,
        **{name: array if ".encoder." in name else np.pad(array, front) for name, array in held.items()},
    }
    return {name: made[name] for name in form.example}


def _written(network: Network, states: Any, mask: Any, name: str, most: int) -> Ids:
    """(tokens,): the start and the likeliest tokens behind it, at least two in all."""
    start = getattr(network.model.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(network.config, "bos_token_id", None)
    if start is None:
        raise InputError(
            f"config.json of {network.folder.name} has no decoder_start_token_id, so nobody can tell what its decoder "
            "reads first. Give samples of the decoder with --data."
        )
    end = getattr(network.config, "eos_token_id", None)
    ends = set(end) if isinstance(end, list | tuple) else {end}
    ids, cache = [int(start)], caches.empty_cache(both=True)
    while len(ids) < most and (len(ids) < 2 or ids[-1] not in ends):
        logits = decoded(network, torch_here().tensor([ids[-1:]]), states, mask, **{name: cache})
        ids.append(int(logits[0, -1].argmax()))
    return np.asarray(ids, np.int64)
