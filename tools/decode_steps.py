"""Decode step by step with a float model and its Q/DQ model, each feeding back its own cache: does the error grow?

    python tools/decode_steps.py FLOAT.onnx INT8.onnx --start FIRST.npz [--steps 32] [--least-db DB] [--pair IN=OUT ...]
    python tools/decode_steps.py FLOAT.onnx --start FIRST.npz --record FOLDER      the inputs of each step, as samples

FIRST.npz holds the inputs of the first step: tokens with an empty cache, or one token behind some. Both models read the
same tokens, the float model's likeliest ones; each gets back the keys and values that it made itself. For each step:
SQNR of the first output, also with the float model's cache in place of the own one, and whether the likeliest word is
the same. A cache is paired with the output of its name, `present` for `past`, or by --pair. A cache of fixed length
keeps its last values. The mask grows, positions go on. Exit code 1 where the own cache costs the last quarter of the
steps more than 3 dB, or any step has less than --least-db. Where later steps are worse with either cache, they are
unlike the calibration samples: --record gives some that are like them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.core import arithmetic, onnx_runtime as ort
from engines.verify.sums import decibels

DRIFT_DB = 3.0
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: energies of the float model's output and of both errors, and whether the likeliest word is the same."""

    signal: float
    own: float
    fresh: float
    agrees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one step reads and makes."""

    inputs: Arrays
    outputs: Arrays


def pairs_of(inputs: Sequence[str], outputs: Sequence[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Input -> the output that is fed back to it.

    >>> pairs_of(["input_ids", "past_key_values.0.key"], ["logits", "present.0.key"])
    {'past_key_values.0.key': 'present.0.key'}
    """
    tails = {re.sub(r"^present(_key_values)?", "", name): name for name in outputs if name.startswith("present")}
    pasts = {name: re.sub(r"^past(_key_values)?", "", name) for name in inputs if name.startswith("past")}
    return {name: tails[tail] for name, tail in pasts.items() if tail in tails} | dict(given or {})


def following(sample: Mapping[str, np.ndarray], made: Arrays, pairs: Mapping[str, str], word: np.ndarray) -> Arrays:
    """The inputs of the next step: `word` (batch, 1) behind the caches that were made."""
    after = dict(sample)
    grows = False
    for name, output in pairs.items():
        old, new = sample[name], made[output]
        axis = next((i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b), None)
        after[name] = new
        grows = grows or axis is not None
    for name, array in sample.items():
        if name.endswith("input_ids"):
            after[name] = word.astype(array.dtype)
        elif "mask" in name and grows:
            added = np.ones_like(array[..., -1:]) if array.dtype.kind in "iub" else np.zeros_like(array[..., -1:])
            after[name] = np.concatenate([array, added], axis=-1)
        elif "position" in name:
            after[name] = array[..., -1:] + 1
    return after


def fitted(sample: Arrays, session: Any) -> Arrays:
    """The same where inputs have fixed sizes: the last elements of what is longer."""
    declared = {i.name: i.shape for i in session.get_inputs()}
    return {
        name: array[tuple(slice(-n, None) if isinstance(n, int) and n else slice(None) for n in declared[name])]
        for name, array in sample.items()
    }


def states(session: Any, start: Mapping[str, np.ndarray], steps: int, pairs: Mapping[str, str]) -> Iterator[State]:
    """The inputs and outputs of each step of an `onnxruntime.InferenceSession`, each word its likeliest one."""
    sample = dict(start)
    for _ in range(steps):
        fed = fitted(sample, session)
        made = _made(session, fed)
        yield State(inputs=fed, outputs=made)
        sample = following(sample, made, pairs, _word(made))


def decode(
    floating: Any, low: Any, start: Mapping[str, np.ndarray], steps: int, pairs: Mapping[str, str]
) -> Iterator[Step]:
    """The steps of two sessions on the words of the first; `start` are the inputs of the first step."""
    own = dict(start)
    for state in states(floating, start, steps, pairs):
        fed = {**state.inputs, **{name: own[name] for name in pairs}}
        found, fresh = (_made(low, fitted(sample, low)) for sample in (fed, state.inputs))
        wanted = next(iter(state.outputs.values())).astype(np.float64)
        errors = [float(((next(iter(made.values())) - wanted) ** 2).sum()) for made in (found, fresh)]
        agrees = bool((_word(state.outputs) == _word(found)).all())
        yield Step(signal=float((wanted**2).sum()), own=errors[0], fresh=errors[1], agrees=agrees)
        own = following(own, found, pairs, _word(state.outputs))


def _made(session: Any, sample: Arrays) -> Arrays:
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, sample), strict=True))


def _word(made: Arrays) -> np.ndarray:
    """(batch, 1) the likeliest word behind the last token, by the first output."""
    word: np.ndarray = next(iter(made.values()))[:, -1:].argmax(-1)
    return word


def sqnr_db(steps: Sequence[Step], *, fresh: bool = False) -> float:
    """Of some steps together, in dB."""
    return decibels(sum(s.signal for s in steps), sum(s.fresh if fresh else s.own for s in steps))


def drift_db(steps: Sequence[Step]) -> float:
    """How many dB the last quarter of the steps has less with the own cache than with the float model's."""
    last = steps[-max(len(steps) // 4, 1) :]
    return sqnr_db(last, fresh=True) - sqnr_db(last)


def main() -> int:
    """Print the steps; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_model", type=Path)
    parser.add_argument("int8_model", type=Path, nargs="?")
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--least-db", type=float, default=0.0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--pair", action="append", default=[], metavar="IN=OUT")
    given = parser.parse_args()
    floating = ort.session(given.float_model)
    inputs, outputs = [i.name for i in floating.get_inputs()], [o.name for o in floating.get_outputs()]
    with np.load(given.start) as stored:
        start = {name: stored[name] for name in inputs}
    pairs = pairs_of(inputs, outputs, dict(pair.split("=", 1) for pair in given.pair))
    if not pairs:
        sys.exit(f"No output is fed back: the inputs are {inputs}, the outputs {outputs}. Give --pair IN=OUT.")
    if given.record:
        given.record.mkdir(parents=True, exist_ok=True)
        for number, state in enumerate(states(floating, start, given.steps, pairs)):
            np.savez(given.record / f"{number:04}.npz", **state.inputs)
    if not given.int8_model:
        return 0
    steps = list(decode(floating, arithmetic.session(given.int8_model), start, given.steps, pairs))
    print("step  own cache  float cache  same word")
    for number, step in enumerate(steps):
        print(f"{number:4}  {sqnr_db([step]):9.1f}  {sqnr_db([step], fresh=True):11.1f}  {step.agrees}")
    least, drift = min(sqnr_db([step]) for step in steps), drift_db(steps)
    print(
        f"all {len(steps)}: {sqnr_db(steps):.1f} dB, with the float cache {sqnr_db(steps, fresh=True):.1f}; least "
        f"{least:.1f}; the own cache costs the last quarter {drift:.1f} dB; {sum(s.agrees for s in steps)} words agree"
    )
    return int(drift > DRIFT_DB or least < given.least_db)


if __name__ == "__main__":
    sys.exit(main())
