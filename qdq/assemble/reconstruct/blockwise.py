"""Learn the codes of a whole model, block after block, and keep them where held-out samples say so.

float model + solution + samples -> both models run side by side in stages (`Stages`), one a block -> each block learned
from what the quantized blocks before it leave -> codes into the solution -> Q/DQ model -> judged on samples held out.
A block is kept under a hash of all that decides it where `--cache` is in force, so that a run that is killed loses one
block at most. It must not choose scales; a block that PyTorch cannot compute keeps the codes it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from engines.core.errors import import_runtime
from qdq.assemble.held_out import MOST_HELD, HeldOutScore, Split, comparable, decibels, energies, ranked
from qdq.assemble.insert import insert
from qdq.assemble.reconstruct import learning
from qdq.assemble.reconstruct.cuts import cut
from qdq.assemble.reconstruct.learning import Arrays, Block, Example, Learned, learn
from qdq.assemble.reconstruct.operators import Tensor, Unknown, operators, run, tensor
from qdq.core.disk.cache import remembered
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QTensor
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.staged import Stages, can_stage
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.model.nodes import needed, reads
from qdq.model.shift_correction import weight_sums
from qdq.model.weight_store import key_of
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import Weight, WeightedNode, by_weight
from qdq.solve.equalize.carriers import scaled
from qdq.solve.solve import Solution

MOST_FIT = 64  # samples that codes are learned from
VALUES = 1 << 28  # of activations that a block may hold, over all samples; of larger ones fewer samples are taken
LEAST = 4  # samples, whatever their size
AGREES_DB = 30.0  # PyTorch and ONNX Runtime, which may round a value to the next code

Codes = Mapping[Weight, npt.NDArray[np.float32]]


def require() -> None:
    """Raise where PyTorch is missing.

    Raises:
        MissingRuntimeError: says what to install.
    """
    import_runtime("torch")


def reconstructed(
    model: Model, plan: Plan, solution: Solution, samples: Iterable[Sample], *, on_progress: Progress | None = None
) -> tuple[Solution, Model]:
    """The solution with learned codes, its Q/DQ model, and a note that says what became of it.

    Args:
        model: the prepared float model.
        plan: the solution's.
        solution: its codes are those to start from.
        samples: re-iterable calibration samples; a quarter of them, at most MOST_HELD, judge.

    Raises:
        MissingRuntimeError: PyTorch is not installed.
    """
    require()
    made = insert(model, plan, solution)
    order = ranked(samples)
    count = min(MOST_HELD, len(order) // 4 or 1)
    why = ""
    if is_large(model.graph.initializer):
        why = "a model of this size is not run in pieces"
    elif not can_stage(model) or not can_stage(made):
        why = "a tensor of it has a type that cannot be kept between blocks"
    elif len(order) < 2:
        why = "one calibration sample cannot judge what is learned from it"
    weights = {} if why else _weights(model, made, solution)
    if not weights:
        note = f"no codes are learned: {why or 'the model has no whole-number codes of its own weights'}"
        return replace(solution, notes=(*solution.notes, note)), made
    held = Split(samples=samples, fit=order[count : count + MOST_FIT], held=frozenset(order[:count]))
    work = _Blockwise(model=model, plan=plan, solution=solution, held=held)
    learned, notes = work.learned(weights, on_progress)
    nearest = _with(solution, {k: np.clip(np.rint(w.exact), w.low, w.high) for k, w in weights.items()})
    signals, (plain, before, after) = HeldOutScore(model, held).energies(
        insert(model, plan, each) for each in (nearest, solution, learned)
    )
    dbs = [decibels(signals, each) for each in (plain, before, after)]
    best = max(range(3), key=lambda index: (dbs[index], -index))
    took = ("nearest codes", "the codes of each layer alone", "learned codes")[best]
    note = (
        f"reconstruct took {took}: output SQNR in dB on {len(held.held)} held-out calibration samples {dbs[0]:.1f} "
        f"with nearest codes, {dbs[1]:.1f} with those of each layer alone, {dbs[2]:.1f} with learned ones"
    )
    solution = (nearest, solution, learned)[best]
    solution = replace(solution, notes=(*solution.notes, *notes, note))
    return solution, insert(model, plan, solution)


def _with(solution: Solution, codes: Codes) -> Solution:
    """The solution with other codes of some weights."""
    weights = dict(solution.weights)
    for key, values in codes.items():
        weights[key] = replace(weights[key], codes=values.astype(weights[key].codes.dtype))
    return replace(solution, weights=weights)


def _weights(model: Model, made: Model, solution: Solution) -> dict[Weight, Learned]:
    """The weights that can be learned: whole-number codes of their own, which the nodes of the main graph read."""
    found = {}
    for key, readers in by_weight(solution.nodes.values()).items():
        coded = solution.weights[key]
        params, first = coded.params, readers[0]
        inner = any(node.name in model.inner_nodes for node in readers)
        if inner or first.trained or key in solution.tables.shared or not FORMATS[params.format].integer:
            continue
        placed = dict[str, Callable[[Tensor], Tensor]]()
        for node in readers:
            name = _codes_of(made, made.node(node.name).input[1])
            if name is None or (layout := _layout(coded.codes, made.array(name))) is None:
                break
            placed[name] = layout
        else:
            fmt = FORMATS[params.format]
            low = fmt.low if params.block else -fmt.high
            exact = _exact(model, first, coded, solution)
            codes = coded.codes.astype(np.float32)
            found[key] = Learned(codes=codes, exact=exact, low=low, high=fmt.high, placed=placed)
    return found


def _exact(model: Model, reader: WeightedNode, coded: QTensor, solution: Solution) -> npt.NDArray[np.float32]:
    """The weight in units of its scales; 0 where blocks are padded."""
    divisor, factor = solution.divisors.get(reader.data), solution.factors.get(reader.name)
    values = scaled(model.array(reader.weight), reader, divisor, factor).astype(np.float32)
    ones = QTensor(codes=np.ones_like(coded.codes), params=replace(coded.params, length=None))
    pads = [(0, long - short) for long, short in zip(coded.codes.shape, values.shape, strict=True)]
    return np.asarray(np.pad(values, pads) / ones.values(), dtype=np.float32)


def _codes_of(model: Model, tensor_name: str) -> str | None:
    """The constant codes that a weight operand is made of; None where it is made in another way."""
    maker = model.producer(tensor_name)
    while maker is not None and maker.op_type in ("DequantizeLinear", "QuantizeLinear"):
        tensor_name = maker.input[0]
        maker = model.producer(tensor_name)
    return tensor_name if maker is None and model.is_constant(tensor_name) else None


def _layout(codes: npt.NDArray[np.generic], stored: npt.NDArray[np.generic]) -> Callable[[Tensor], Tensor] | None:
    """What the graph holds of some codes: the same, transposed, or with more input channels; None if neither."""
    if np.array_equal(codes, stored):
        return lambda t: t
    if codes.ndim == 2 and np.array_equal(codes.T, stored):
        return lambda t: t.T
    more = stored.shape[1] - codes.shape[1] if stored.ndim == codes.ndim > 1 else 0
    pads = [(0, more if axis == 1 else 0) for axis in range(codes.ndim)]
    if more <= 0 or not np.array_equal(np.pad(codes, pads), stored):
        return None
    flat = [0] * (2 * (codes.ndim - 2)) + [0, more]
    return lambda t: import_runtime("torch").nn.functional.pad(t, flat)


def _rescaled(model: Model, solution: Solution) -> set[str]:
    """Tensors of the float model that have other values in the Q/DQ model, for their channels are divided as made."""
    found = set[str]()
    for divided, carrier in solution.carriers.items():
        ends, stack = {operand.node for operand in carrier.operands}, [divided]
        while stack:
            name = stack.pop()
            maker = model.producer(name)
            if name in found or maker is None:
                continue
            found.add(name)
            if maker.name not in ends:
                stack.extend(reads(maker))
    return found


@dataclass(slots=True, kw_only=True)
class _Blockwise:
    """Both models in stages, and the solution as far as it is learned."""

    model: Model
    plan: Plan
    solution: Solution
    held: Split

    def learned(
        self, weights: Mapping[Weight, Learned], on_progress: Progress | None
    ) -> tuple[Solution, tuple[str, ...]]:
        """The solution with learned codes, and notes."""
        model, made = self.model, insert(self.model, self.plan, self.solution)
        nodes = {n.name: n.key for n in self.solution.nodes.values() if n.key in weights}
        known = made.names()
        barred = {t for node in model.graph.node for t in node.output if t not in known}
        cuts = cut(model, nodes, barred | _rescaled(model, self.solution), comparable(model))
        wanted = [[name for name in some if name in known] for some in cuts]
        done, gained, left = set[Weight](), 0, list[str]()
        samples = self._samples(wanted)
        with Stages(model, wanted, samples) as exact, Stages(made, wanted, samples) as coded:
            for number, outputs in enumerate(wanted):
                if on_progress is not None:
                    on_progress(number, len(wanted), "reconstructing blocks")
                names = {node.name for node in coded.next_nodes(made)}
                keys = [key for key in dict.fromkeys(nodes[n] for n in nodes if n in names) if key not in done]
                done.update(keys)
                block = partial(self._block, made, coded.next_nodes(made), outputs)
                before = [(exact.held(i), coded.held(i)) for i in range(len(samples))]
                tried = coded.tried(made, 0) if keys else {}
                finals = exact.run(model, dict)
                if keys:
                    rest = {**finals[0], **exact.held(0)} if number + 1 < len(wanted) else {}
                    piece = block({k: weights[k] for k in keys}, rest)
                    examples = [_example(piece, *pair, finals[i], exact.held(i)) for i, pair in enumerate(before)]
                    try:
                        found = self._learn(piece, examples, tried)
                    except Unknown as error:
                        left.append(str(error))
                        found = {}
                    if found:
                        gained += 1
                        self.solution = _with(self.solution, found)
                        made = insert(model, self.plan, self.solution)
                coded.run(made, lambda _: None)
        note = f"codes of {gained} of {len(wanted)} blocks are learned from {len(self.held.fit)} samples"
        unknown = f"; {len(left)} blocks keep theirs, for PyTorch has no {', '.join(dict.fromkeys(left))} as here"
        return self.solution, (note + (unknown if left else ""),)

    def _samples(self, wanted: Sequence[Sequence[str]]) -> list[Sample]:
        """Those to learn from, then those that judge; fewer of large ones."""
        first = next(self.held.fitting())
        sizes = {i.name: int(np.prod(np.shape(first[i.name]))) for i in self.model.inputs}
        most = max(LEAST, VALUES // max(1, self._widest(wanted, max(sizes.values(), default=1))))
        chosen = self.held.fit[:most]
        self.held = replace(self.held, fit=chosen)
        by_index = dict[int, Sample]()
        judged = sorted(self.held.held)[: max(1, len(chosen) // 3)]
        for index, sample in enumerate(self.held.samples):
            if index in chosen or index in judged:
                by_index[index] = sample
        return [by_index[i] for i in (*chosen, *judged)]

    def _widest(self, wanted: Sequence[Sequence[str]], given: int) -> int:
        """Values that the widest block reads and leaves for one sample, about: by shapes where they are known."""
        most = given
        for names in wanted:
            shapes = [info.shape for name in names if (info := self.model.info(name)) is not None and info.shape]
            sizes = (int(np.prod([d if isinstance(d, int) else 1 for d in shape])) for shape in shapes)
            most = max(most, sum(sizes))
        return 4 * most

    def _block(
        self,
        made: Model,
        nodes: Sequence[NodeProto],
        outputs: Sequence[str],
        weights: Mapping[Weight, Learned],
        rest: Arrays,
    ) -> Block:
        """A piece of the Q/DQ model, whose products see data that are not shifted, and the float rest behind it."""
        if any(n.op_type == "QuantizeLinear" and not _int8(made, n) for n in nodes):
            nodes = [helper.make_node("a quantizer of another type", [], [])]
        codes = {name for weight in weights.values() for name in weight.placed}
        piece, constants = self._unshifted(nodes, weights)
        read = {name for node in nodes for name in reads(node)}
        constants |= {n: tensor(made.array(n)) for n in read if made.is_constant(n) and n not in codes}
        predictions = [n for n in comparable(self.model) if "float" in self.model.dtype(n)]
        behind = _behind(self.model, predictions, rest) if rest else []
        known = operators()
        if any(node.domain or node.op_type not in known for node in behind) or set(predictions) & set(rest):
            behind = []
        stored = {n for node in behind for n in reads(node) if self.model.is_constant(n)}
        return Block(
            nodes=piece,
            constants=constants,
            weights=weights,
            outputs=outputs,
            rest=behind,
            rest_constants={n: tensor(self.model.array(n)) for n in stored},
            predictions=predictions,
        )

    def _unshifted(
        self, nodes: Sequence[NodeProto], weights: Mapping[Weight, Learned]
    ) -> tuple[list[NodeProto], dict[str, Tensor]]:
        """The same, where shifted data get their shift back before a product and its output loses what made up for it.

        The bias holds the shift times the sum of the weights that were; those that are learned have another sum.
        """
        made, constants = list[NodeProto](), dict[str, Tensor]()
        for node in nodes:
            reader = self.solution.nodes.get(node.name)
            params = self.solution.activations.get(reader.data) if reader is not None and reader.data_spec else None
            if reader is None or params is None or not params.zero_point or reader.key not in weights:
                made.append(node)
                continue
            lacking = params.offset * weight_sums(self.solution.weights[reader.key], node)
            if node.op_type == "Conv":
                lacking = lacking.reshape(-1, *(1,) * reader.spatial)
            offset, sums = f"{node.name}@offset", f"{node.name}@sums"
            constants |= {offset: tensor(np.asarray(params.offset)), sums: tensor(lacking)}
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[0], copy.output[0] = f"{node.name}@data", f"{node.name}@product"
            made += [
                helper.make_node("Add", [node.input[0], offset], [copy.input[0]]),
                copy,
                helper.make_node("Sub", [copy.output[0], sums], [node.output[0]]),
            ]
        return made, constants

    def _learn(self, block: Block, examples: Sequence[Example], tried: Arrays) -> Codes:
        """Codes of a block, if need be from an earlier run."""
        _require_same(block, examples[0], tried)
        count = len(self.held.fit)

        def key() -> tuple[object, ...]:
            arrays = (a for e in examples for part in (e.read, e.exact, e.wanted, e.beside) for a in part.values())
            starts = (a for w in block.weights.values() for a in (w.codes, w.exact))
            how = {n: v for n, v in vars(learning).items() if n.isupper()}
            nodes = [n.SerializeToString(deterministic=True) for n in (*block.nodes, *block.rest)]
            stored = [t.numpy() for t in (*block.constants.values(), *(block.rest_constants or {}).values())]
            return (count, repr(how), key_of(*nodes, *stored, *arrays, *starts))

        def pack(found: Codes) -> dict[str, bytes]:
            return {str(i): found[k].astype(np.int8).tobytes() for i, k in enumerate(block.weights) if k in found}

        def unpack(parts: dict[str, bytes]) -> Codes:
            shapes = {str(i): (k, w.codes.shape) for i, (k, w) in enumerate(block.weights.items())}
            return {
                shapes[i][0]: np.frombuffer(b, np.int8).reshape(shapes[i][1]).astype(np.float32)
                for i, b in parts.items()
            }

        make = partial(learn, block, examples[:count], examples[count:])
        return remembered("reconstructed", key, make, pack=pack, unpack=unpack)


def _int8(model: Model, node: NodeProto) -> bool:
    """Whether a quantizer makes INT8 codes."""
    zero = node.input[2] if len(node.input) > 2 else ""
    return bool(zero) and model.is_constant(zero) and model.array(zero).dtype == np.int8


def _behind(model: Model, outputs: Sequence[str], known: Arrays) -> list[NodeProto]:
    """The nodes that make a model's outputs of known tensors."""
    nodes = [node for node in model.graph.node if not all(name in known for name in node.output)]
    return needed(nodes, [name for name in outputs if name not in known])


def _example(block: Block, floats: Arrays, coded: Arrays, finals: Arrays, kept: Arrays) -> Example:
    """What one sample has at a block: from the float and the Q/DQ model before it, and the float model behind it."""
    after = {**kept, **finals}
    made = {name for node in block.nodes for name in node.output}
    read = {n for node in block.nodes for n in reads(node)} - made
    behind = {n for node in block.rest for n in reads(node)} - {n for node in block.rest for n in node.output}
    return Example(
        read={n: coded[n] for n in read if n in coded},
        exact={n: floats[n] for n in read if n in coded and n in floats},
        wanted={n: after[n] for n in block.outputs},
        beside={n: after[n] for n in behind if n in after and n not in block.outputs},
    )


def _require_same(block: Block, example: Example, expected: Arrays) -> None:
    """Refuse a block that PyTorch computes otherwise than ONNX Runtime.

    Raises:
        Unknown: an operator, or a form of one, is not known.
    """
    torch = import_runtime("torch")
    values = {**block.constants, **{n: tensor(a) for n, a in example.read.items()}}
    for weight in block.weights.values():
        values.update((name, place(tensor(weight.codes))) for name, place in weight.placed.items())
    try:
        with torch.no_grad():
            run(block.nodes, values)
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unknown(f"{type(error).__name__} ({' '.join(str(error).split())[:80]})") from None
    wanted = {n: expected[n] for n in block.outputs if expected[n].dtype.kind == "f"}
    signal, noise = energies(wanted, {n: values[n].numpy() for n in wanted})
    if decibels([signal], [noise]) < AGREES_DB:
        raise Unknown("operator that agrees with ONNX Runtime's")
