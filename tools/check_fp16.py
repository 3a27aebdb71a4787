"""Hold the FP16 stand-in against onnx's reference: ONNX's own node tests in FP16, and models node by node.

    python tools/check_fp16.py [--op OP] [--model X.onnx --samples FOLDER]

Each node test with float inputs is made FP16. Expected: the reference evaluator computes every node in FP32 from values
that FP16 holds, and its results are rounded to FP16 once. Found: `engines.core.arithmetic` in ONNX Runtime. They agree
where no value is more than one unit in the last place of FP16 apart, and codes and booleans are equal; what FP32 itself
loses of a tensor's largest value (1e-6 of it) does not count, or sums that cancel to zero would. Prints how many agree,
those that do not, and what was left out and why. Of a model every node is checked, on the values that the stand-in
gives it.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from node_tests import RANDOM, collected
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.core import arithmetic, onnx_runtime as ort
from engines.core.nodes import all_nodes, all_tensors, bodies
from engines.core.operators import CONTRACTIONS
from engines.core.shapes import inferred

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
OLDER = 23  # an opset whose quantizers ONNX Runtime has
LOST = 1e-6  # what FP32 loses at most of the largest value that goes into a sum
TYPES = ("to", "dtype", "output_dtype", "output_datatype")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one test: 'agrees', 'differs', or why it was left out."""

    name: str
    verdict: str
    detail: str = ""


def node_tests(op_type: str | None = None) -> Iterator[Any]:
    """ONNX's node tests, of one operator or all."""
    yield from (c for c in collected() if op_type in (None, *(node.op_type for node in c.model.graph.node)))


def halved(model: ModelProto) -> ModelProto:
    """The model with FP16 in place of FP32."""
    made = ModelProto()
    made.CopyFrom(model)
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = HALF
    for tensor in all_tensors(made):
        if tensor.data_type == FLOAT:
            with np.errstate(over="ignore"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in all_nodes(made.graph):
        for held in node.attribute:
            if held.name in TYPES and held.i == FLOAT:
                held.i = HALF
    untyped = ModelProto()  # statistics stay FP32 beside FP16 results: the standard says which
    untyped.CopyFrom(made)
    for value in untyped.graph.output:
        value.ClearField("type")
    for value, found in zip(made.graph.output, inferred(untyped).output, strict=True):
        if value.type.tensor_type.elem_type == HALF and found.type.tensor_type.elem_type:
            value.type.tensor_type.elem_type = found.type.tensor_type.elem_type
    return made


def rounded(array: Any, kind: int) -> Any:
    """A value of the reference as a tensor of that type holds it, in FP32 where that is FP16."""
    if kind != HALF or not isinstance(array, np.ndarray | np.generic):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(array).astype(np.float16).astype(np.float32)


def expected(model: ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """All tensors of an FP16 model: each node by the reference in FP32, its results rounded once."""
    types = {v.name: v.type.tensor_type.elem_type for v in inferred(model).value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    values: dict[str, Any] = {t.name: _wide(numpy_helper.to_array(t)) for t in model.graph.initializer}
    values |= {name: _wide(array) for name, array in feeds.items()}
    for node in model.graph.node:
        results = one_node(node, [values[name] if name else None for name in node.input], model.opset_import)
        for name, array in zip(node.output, results, strict=False):
            if name:
                values[name] = rounded(array, types.get(name, 0))
    return values


def one_node(node: NodeProto, arrays: list[Any], opsets: Any) -> list[Any]:
    """The results of one node by the reference, in FP32."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for held in copy.attribute:
        if held.name in TYPES and held.i == HALF:
            held.i = FLOAT
        if held.HasField("t") and held.t.data_type == HALF:
            held.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held.t).astype(np.float32), held.t.name))
    given = {name: array for name, array in zip(node.input, arrays, strict=True) if name}
    ends = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(a).dtype), np.shape(a))
        for name, a in given.items()
    ]
    outs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([copy], "one", ends, outs)
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opsets))).run(None, given)
    named = dict(zip([o.name for o in outs], found, strict=True))
    return [named.get(name) for name in node.output]


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The most units in the last place of FP16 between two arrays; of codes and booleans 0 or many."""
    if a.shape != b.shape:
        return 1 << 20
    if a.dtype.kind != "f" or a.dtype == np.float64:
        return 0 if np.array_equal(a, b.astype(a.dtype), equal_nan=a.dtype.kind == "f") else 1 << 20
    with np.errstate(over="ignore", invalid="ignore"):
        bits = [np.asarray(x).astype(np.float16) for x in (a, b)]
    nan = np.isnan(bits[0])
    if not np.array_equal(nan, np.isnan(bits[1])):
        return 1 << 20
    order = [np.where(x.view(np.int16) < 0, -(x.view(np.int16).astype(int) & 0x7FFF), x.view(np.int16)) for x in bits]
    return int(np.abs(np.where(nan, 0, order[0] - order[1])).max(initial=0))


def judge(case: Any) -> Outcome:
    """Check one node test."""

    def left(why: str, detail: str = "") -> Outcome:
        return Outcome(name=case.name, verdict=f"left out: {why}", detail=detail)

    given = case.data_sets[0][0] if case.data_sets else []
    arrays = [np.asarray(a) if isinstance(a, np.generic) else a for a in given if a is not None]
    if not any(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in arrays):
        return left("no FP32 input")
    if not all(isinstance(a, np.ndarray) for a in arrays):
        return left("inputs are sequences or optional values")
    ops = {node.op_type for node in all_nodes(case.model.graph)}
    if ops & RANDOM:
        return left("random values")
    if any(any(True for _ in bodies(node)) for node in case.model.graph.node):
        return left("bodies: If, Loop and Scan are tested in code")
    model = halved(case.model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return left("the standard does not take FP16 there")
    feeds = {}
    for value, array in zip(model.graph.input, arrays, strict=False):
        feeds[value.name] = array.astype(np.float16) if array.dtype == np.float32 else array
    try:
        session = _opened(model)
    except ort.EngineError as error:
        return left("ONNX Runtime has no such operator", str(error)[:200])
    try:
        wanted = expected(model, feeds)
    except Exception as error:
        return left("the reference fails", f"{type(error).__name__}: {error}"[:200])
    try:
        found = next(ort.run(session, [feeds]))
    except ort.EngineError as error:
        return left("ONNX Runtime cannot run it", str(error)[:200])
    kinds = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    try:
        far = {n: _tolerant(_wide(array), np.asarray(wanted[n]), kinds[n]) for n, array in found.items()}
    except (TypeError, ValueError, AttributeError) as error:
        return left("outputs are no numbers", str(error)[:100])
    worst = max(far, key=far.__getitem__)
    if far[worst] > 1 and max(_native(case, feeds, found), default=0) > 1e-3:
        return left("ONNX Runtime differs from the reference in FP32 too", f"{worst}: {far[worst]} units")
    verdict = "agrees" if far[worst] <= 1 else "differs"
    return Outcome(name=case.name, verdict=verdict, detail=f"{worst}: {far[worst]} units in the last place")


def _opened(model: ModelProto) -> Any:
    """A session of the stand-in; of an older opset where ONNX Runtime lacks the newest version of an operator."""
    try:
        return arithmetic.session(model)
    except ort.EngineError:
        for entry in model.opset_import:
            entry.version = min(entry.version, OLDER) if entry.domain in ("", "ai.onnx") else entry.version
        return arithmetic.session(model)


def _native(case: Any, feeds: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[float]:
    """Relative differences between ONNX Runtime and the reference on the FP32 test itself."""
    wide = {name: _wide(array) for name, array in feeds.items()}
    ours = next(ort.run(_opened(case.model), [wide]))
    theirs = expected(case.model, wide)
    pairs = [(ours[n].astype(np.float64), np.asarray(theirs[n]).astype(np.float64)) for n in found]
    return [
        float(np.nanmax(np.abs(a - b), initial=0) / max(np.nanmax(np.abs(b), initial=0), 1e-30)) if a.shape == b.shape
        else 1.0
        for a, b in pairs
    ]  # fmt: skip


def node_by_node(model: ModelProto, sample: dict[str, np.ndarray], most: int = 400) -> list[Outcome]:
    """Each node of a model in low types on the values that the stand-in gives it, against the reference."""
    kinds = arithmetic.float_types(model)
    tapped = arithmetic.stand_in(model)
    if tapped is model:
        tapped = ModelProto()
        tapped.CopyFrom(model)
    made = {name for node in tapped.graph.node for name in node.output} - {o.name for o in tapped.graph.output}
    tapped.graph.output.extend(
        onnx.ValueInfoProto(name=n) for node in model.graph.node for n in node.output if n in made
    )
    values: dict[str, Any] = dict(next(ort.run(ort.session(tapped), [sample])))
    values |= {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} | sample
    outcomes = []
    for node in [n for n in model.graph.node if any(name in kinds for name in n.output)][:most]:
        if not all(name in values for name in node.input if name):
            continue
        arrays = [_wide(values[name]) if name else None for name in node.input]
        try:
            wanted = one_node(node, arrays, model.opset_import)
        except Exception as error:
            outcomes.append(Outcome(name=node.name, verdict="left out: the reference fails", detail=str(error)[:200]))
            continue
        known = [name for name in node.output if name in values]
        if any(np.shape(values[n]) != np.shape(a) for n, a in zip(node.output, wanted, strict=True) if n in known):
            outcomes.append(Outcome(name=node.name, verdict="left out: the reference gives another shape"))
            continue
        terms: Any = 0.0
        if node.op_type in CONTRACTIONS:
            terms = one_node(node, [None if a is None else np.abs(a) for a in arrays], model.opset_import)[0]
        far = [
            _tolerant(_wide(values[name]), np.asarray(rounded(array, kinds.get(name, 0))), kinds.get(name, 0), terms)
            for name, array in zip(node.output, wanted, strict=True)
            if name in known
        ]
        worst = max(far, default=0)
        verdict = "agrees" if worst <= 1 else "differs"
        outcomes.append(Outcome(name=node.name, verdict=verdict, detail=f"{node.op_type}: {worst} units"))
    return outcomes


def _tolerant(a: np.ndarray, b: np.ndarray, kind: int, terms: Any = 0.0) -> int:
    """Units apart; what FP32 loses of the largest value, or of a product's terms as a whole, does not count."""
    if kind not in (FLOAT, HALF) or a.shape != b.shape:
        return apart(a, b)
    with np.errstate(invalid="ignore"):
        close = np.abs(a - b) <= LOST * np.maximum(np.abs(b[np.isfinite(b)]).max(initial=0), terms)
    return apart(np.where(close, b, a), b)


def show(outcomes: list[Outcome]) -> None:
    """Print counts, what differs, and what was left out."""
    counts = Counter(o.verdict for o in outcomes)
    checked = counts["agrees"] + counts["differs"]
    print(f"{checked} checked: {counts['agrees']} agree within one unit in the last place of FP16")
    for outcome in outcomes:
        if outcome.verdict == "differs":
            print(f"  differs: {outcome.name}: {outcome.detail}")
    for verdict in sorted(v for v in counts if v.startswith("left out")):
        names = [o.name.removeprefix("test_") for o in outcomes if o.verdict == verdict]
        print(f"  {verdict}: {len(names)}: {', '.join(names)}")


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="only the node tests of this operator")
    parser.add_argument("--model", type=Path, help="check a model node by node in place of ONNX's node tests")
    parser.add_argument("--samples", type=Path, help="folder of .npz; the first is used")
    options = parser.parse_args()
    if options.model:
        with np.load(sorted(options.samples.glob("*.npz"))[0]) as held:
            show(node_by_node(onnx.load(options.model), dict(held)))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        show([judge(case) for case in node_tests(options.op)])


if __name__ == "__main__":
    main()
