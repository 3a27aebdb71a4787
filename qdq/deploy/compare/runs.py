"""What is run to score a model: each sample as it is, or copies of it in which tokens are masked; with labels.

samples, task -> `runs` -> `Run`: inputs, and what a metric compares the output with. Must not run a model.

Masked copies of a sample mask every token once, some at a time, but no special one and none that `attention_mask`
leaves out. Which go together is drawn from a seed that is the sample's number: every model gets the same copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data import Samples
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import METRICS, Array, next_tokens
from qdq.deploy.compare.task import MASKED, NEXT, Masking, Task
from qdq.model.model import Model

ATTENDED = "attention_mask"  # what language models call the input that is 0 where padding stands


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a model.

    Attributes:
        sample: number of the sample that it is of, from 1.
        inputs: of the model, by name.
        labels: in the shape of the output's positions, -1 where none counts; None: the float model's output.
    """

    sample: int
    inputs: dict[str, Array]
    labels: Array | None


def runs(samples: Samples, model: Model, task: Task) -> Iterator[Run]:
    """The runs of every sample, in the same order and of the same values each time.

    Raises:
        InputError: no input holds the tokens that the labels are of, the samples lack the array of labels, or no token
            of any sample can be masked.
    """
    names, tokens, found = [i.name for i in model.inputs], task.source(model), False
    if task.array and task.array not in [spec.name for spec in samples.inputs]:
        raise InputError(
            f"The samples to score on hold no array {task.array!r} with labels, only {', '.join(names)}. Give --eval "
            "with real samples that have it, or leave out --labels."
        )
    for number, sample in enumerate(samples, 1):
        inputs = {name: sample[name] for name in names}
        if task.kind == MASKED:
            assert task.masking is not None
            attended = inputs[ATTENDED] != 0 if ATTENDED in inputs else np.ones(inputs[tokens].shape, bool)
            for masked, labels in _copies(inputs[tokens], attended, task, seed=number):
                found |= bool((labels >= 0).any())
                yield Run(sample=number, inputs={**inputs, tokens: masked}, labels=labels)
        elif task.kind == NEXT:
            yield Run(sample=number, inputs=inputs, labels=next_tokens(sample[tokens]))
        else:
            yield Run(sample=number, inputs=inputs, labels=sample[task.array] if task.array else None)
    if task.kind == MASKED and not found:
        raise InputError(
            f"No token of {tokens} can be masked: each is of --special-tokens, the mask token, or padding."
        )


def _copies(tokens: Array, attended: Array, task: Task, *, seed: int) -> Iterator[tuple[Array, Array]]:
    """The copies, with labels; before them the tokens as they are where the metric asks for that."""
    assert task.masking is not None
    if METRICS[task.metric].from_unmasked:
        yield tokens, np.full(tokens.shape, -1, np.int64)
    counted = np.broadcast_to(attended, tokens.shape) & ~np.isin(tokens, [task.masking.token, *task.masking.special])
    flat = tokens.reshape(-1, tokens.shape[-1])
    places = [np.flatnonzero(row) for row in counted.reshape(flat.shape)]
    count, places = _parts(places, task.masking, np.random.default_rng(seed))
    for k in range(count):
        masked, labels = flat.copy(), np.full(flat.shape, -1, np.int64)
        for row, place in enumerate(places):
            chosen = place[k::count]
            labels[row, chosen] = flat[row, chosen]
            masked[row, chosen] = task.masking.token
        yield masked.reshape(tokens.shape), labels.reshape(tokens.shape)


def _parts(
    places: list[npt.NDArray[Any]], masking: Masking, rng: np.random.Generator
) -> tuple[int, list[npt.NDArray[Any]]]:
    """How many copies mask every place once, and the places in an order whose every n-th go together."""
    if masking.share is None:
        return max(map(len, places), default=0), places
    longest = max(map(len, places), default=0)  # a smaller share than one token is one token
    return min(math.ceil(1 / masking.share), longest), [rng.permutation(place) for place in places]
