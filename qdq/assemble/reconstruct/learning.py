"""Learn for each weight of one block whether its code is the one below or above, so that the block's outputs err least.

AdaRound's rectified sigmoid and its penalty (Nagel et al., arXiv 2004.10568) on the weights of a whole block, whose
inputs come from the quantized blocks before it (BRECQ, Li et al., arXiv 2102.05426). Elements of inputs and codes of
data stay unquantized with probability 1/2 in each step (QDrop, Wei et al., arXiv 2203.05740), and what the change of
the block does to the model's outputs through the float rest of it counts beside the block's own error (the prediction
difference of PD-Quant, Liu et al., arXiv 2212.07048; of logits and other outputs alike, so by squares).

Other than in these papers the search starts near codes that second moments have chosen, and few steps are enough.
The same samples and codes give the same result: one generator, a fixed number of threads. It must not judge the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from engines.core.errors import import_runtime
from qdq.assemble.reconstruct.operators import Tensor, run, tensor
from qdq.plan.weighted_node import Weight

STEPS = 240
BATCH = 4  # samples in a step
RATE = 0.03  # of Adam
# Of all weights undecided, in units of the errors before. With a thousandth of it weights stay between two codes until
# the end, where they fit better, and the codes that they are cut to err more than the first ones.
PENALTY = 2500.0
SHARPNESS = (20.0, 2.0)  # exponents of the penalty, at its beginning and its end
NEAR = 0.35  # how far a weight starts from where it was before rounding to its code, of the way
DROP = 0.5  # probability of an unquantized element
THREADS = 1  # of PyTorch: the last bits of sums depend on their number
STRETCH, REACH = 1.2, 0.1  # of the sigmoid, so that it gets to 0 and 1

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """A weight that is learned.

    Attributes:
        codes: whole numbers to start from, float32.
        exact: the weight in units of its scales, not rounded; the same shape.
        low: the smallest code.
        high: the largest one.
        placed: tensor of codes in the graph -> makes it of codes, as torch tensors.
    """

    codes: npt.NDArray[np.float32]
    exact: npt.NDArray[np.float32]
    low: int
    high: int
    placed: Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A piece of a Q/DQ model, and the float rest of the network behind it.

    Attributes:
        nodes: of the piece, in order.
        constants: that they read, but the codes that are learned.
        weights: that are learned.
        outputs: tensors that the piece is to reconstruct.
        rest: nodes of the float model from there to its outputs; empty where predictions are not looked at.
        rest_constants: that these read.
        predictions: outputs of the model.
    """

    nodes: Sequence[NodeProto]
    constants: Mapping[str, Tensor]
    weights: Mapping[Weight, Learned]
    outputs: Sequence[str]
    rest: Sequence[NodeProto] = ()
    rest_constants: Mapping[str, Tensor] | None = None
    predictions: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What one sample has at the block.

    Attributes:
        read: tensors that the block reads, from the quantized blocks before it.
        exact: those of them that the float model has too, from there.
        wanted: the block's outputs in the float model.
        beside: tensors of the float model that its rest reads besides.
    """

    read: Arrays
    exact: Arrays
    wanted: Arrays
    beside: Arrays


@contextmanager
def _same_bits() -> Iterator[None]:
    """PyTorch on a fixed number of threads, with algorithms that give the same bits each time."""
    torch = import_runtime("torch")
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def learn(block: Block, fit: Sequence[Example], held: Sequence[Example]) -> dict[Weight, npt.NDArray[np.float32]]:
    """Codes with which the model's outputs err less on samples held out than with those to start from; empty if none.

    Where the float rest of the network is not looked at, the block's own outputs decide.

    Raises:
        Unknown: PyTorch lacks an operator of the block.
    """
    torch = import_runtime("torch")
    with _same_bits():
        seen, judging = [_Seen(block, each) for each in fit], [_Seen(block, each) for each in held]
        start = {key: tensor(w.codes) for key, w in block.weights.items()}
        with torch.no_grad():
            before = [each.errors(start) for each in seen]
            unit = [max(sum(pair[i] for pair in before) / len(before), 1e-30) for i in range(2)]
        soft = {key: _Soft(w) for key, w in block.weights.items()}
        _descend(soft, seen, unit)
        with torch.no_grad():
            found = {key: each.hard() for key, each in soft.items()}
            after, first = (sum(each.errors(codes)[bool(block.rest)] for each in judging) for codes in (found, start))
    return {key: codes.numpy() for key, codes in found.items()} if float(after) < float(first) else {}


def _descend(soft: Mapping[Weight, _Soft], seen: Sequence[_Seen], unit: Sequence[Tensor]) -> None:
    """Adam on all weights of a block."""
    torch = import_runtime("torch")
    optimizer = torch.optim.Adam([each.v for each in soft.values()], lr=RATE)
    generator, order = torch.Generator().manual_seed(0), random.Random(0)
    count = sum(each.v.numel() for each in soft.values())
    queue = list[int]()
    for step in range(STEPS):
        optimizer.zero_grad()
        for _ in range(min(BATCH, len(seen))):
            if not queue:
                queue = order.sample(range(len(seen)), len(seen))
            codes = {key: each.codes() for key, each in soft.items()}
            (seen[queue.pop()].loss(codes, unit, generator) / min(BATCH, len(seen))).backward()
        beta = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 + np.cos(np.pi * step / STEPS)) / 2
        undecided = sum((1 - (2 * each.gate() - 1).abs() ** beta).sum() for each in soft.values())
        (undecided * (PENALTY / count)).backward()
        optimizer.step()


class _Soft:
    """The codes of a weight between two whole numbers each."""

    def __init__(self, weight: Learned) -> None:
        torch = import_runtime("torch")
        codes, exact = weight.codes, weight.exact
        below = np.clip(np.where(exact >= codes, codes, codes - 1), weight.low, weight.high - 1)
        up = codes - below
        start = NEAR * np.clip(exact - below, 0, 1) + (1 - NEAR) * up
        start = np.where(up > 0.5, np.maximum(start, 0.55), np.minimum(start, 0.45))
        sigmoid = (tensor(start) + REACH) / STRETCH
        self.v = torch.log(sigmoid / (1 - sigmoid)).requires_grad_()
        self._below, self._still = tensor(below), tensor((exact == 0) & (codes == 0))
        self._codes = tensor(codes)

    def gate(self) -> Tensor:
        """The share of each step that is taken, 0 to 1."""
        torch = import_runtime("torch")
        return torch.clamp(STRETCH * torch.sigmoid(self.v) - REACH, 0, 1)

    def codes(self) -> Tensor:
        """Codes that gradients flow through; what was exactly zero stays, as padding does."""
        return import_runtime("torch").where(self._still, self._codes, self._below + self.gate())

    def hard(self) -> Tensor:
        """Whole numbers."""
        torch = import_runtime("torch")
        return torch.where(self._still, self._codes, self._below + (self.gate() >= 0.5))


class _Seen:
    """An example as torch tensors, and the errors of the block on it."""

    def __init__(self, block: Block, example: Example) -> None:
        torch = import_runtime("torch")
        self._block = block
        self._read = {name: tensor(value) for name, value in example.read.items()}
        self._exact = {name: tensor(value) for name, value in example.exact.items()}
        self._wanted = {name: tensor(value) for name, value in example.wanted.items()}
        self._beside = {name: tensor(value) for name, value in example.beside.items()}
        with torch.no_grad():
            self._predicted = self._predict(self._wanted) if block.rest else {}

    def _predict(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's outputs for what the block leaves."""
        values = {**(self._block.rest_constants or {}), **self._beside, **outputs}
        run(self._block.rest, values)
        return {name: values[name] for name in self._block.predictions}

    def outputs(self, codes: Mapping[Weight, Tensor], generator: Any = None) -> dict[str, Tensor]:
        """What the block makes, with elements dropped where there is a generator."""
        torch = import_runtime("torch")

        def dropped(free: Tensor, rounded: Tensor) -> Tensor:
            return torch.where(torch.rand(free.shape, generator=generator) < DROP, free, rounded)

        read = dict(self._read)
        if generator is not None:
            for name, exact in self._exact.items():
                if exact.is_floating_point():
                    read[name] = dropped(exact, read[name])
        values = {**self._block.constants, **read}
        for key, weight in self._block.weights.items():
            values.update((name, place(codes[key])) for name, place in weight.placed.items())
        run(self._block.nodes, values, None if generator is None else dropped)
        return {name: values[name] for name in self._block.outputs}

    def errors(self, codes: Mapping[Weight, Tensor], generator: Any = None) -> tuple[Tensor, Tensor]:
        """The squared errors of the block's outputs and of the predictions; the latter 0 where none are looked at."""
        made = self.outputs(codes, generator)
        own = sum(((made[name] - self._wanted[name]) ** 2).sum() for name in made if made[name].is_floating_point())
        if not self._block.rest:
            return own, own * 0
        predicted = self._predict(made)
        return own, sum(((predicted[name] - value) ** 2).sum() for name, value in self._predicted.items())

    def loss(self, codes: Mapping[Weight, Tensor], unit: Sequence[Tensor], generator: Any = None) -> Tensor:
        """Both errors in units of the first ones."""
        own, predicted = self.errors(codes, generator)
        return own / unit[0] + predicted / unit[1]
