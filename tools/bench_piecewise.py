"""What quantized products gain by more than one INT8 scale for their data: per token, piecewise, outliers apart.

    python tools/bench_piecewise.py MODEL --data SAMPLES --eval SAMPLES [--count N] [--gpu GPU] [--forms FORM ...]

Every MatMul and Gemm that qdq's plan quantizes gets INT8 weights, one scale a channel, rounded to nearest, without
equalization, shift or bias correction; only the form of the data differs:

    tensor     one scale, of least squared error on the samples of --data
    max        one scale, of the largest magnitude: "uniform" in the literature
    token      one scale a row, computed as the engine runs
    piecewise  clip(x, -p, p) and the rest have a scale each and a product each, whose sum is the product: PWLQ (arXiv
               2002.00104) as PTQ4Protein uses it, p of least squared error
    outliers   the sixteenth of the channels whose largest magnitudes are largest is set apart, with a scale and a
               small product of its own
    outliers, token    the same, each part with one scale a row
    two words  a high and a low INT8 word of 15 bits together: the most that two products can do
    float      data as they are: what the weights alone lose

SQNR is that of the worst output against the float model, in ONNX Runtime, Q and DQ as nodes of their own; the median
product is the SQNR of the product that has as many better as worse ones, of float data in it. Kernels and time, which
is predicted, are of the engine that TensorRT-RTX compiles.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from results import record

from calib_data import Samples, open_samples
from engines.backends.compiler import ShapeRange
from engines.core import arithmetic, onnx_runtime as ort
from engines.core.errors import EngineError
from engines.cost.predict import predict
from engines.verify.audit import audit
from qdq.build.engine import shape_ranges
from qdq.build.kept import kept_engine
from qdq.build.pricing.pricer import gpus_of
from qdq.build.recipe import Recipe
from qdq.measure.inference.inputs import input_specs
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import WeightedNode, weighted_nodes

HIGH = 127
APART = 16  # one channel of so many is set apart
LEAST = 2.0**-14  # of a row's scale
STEPS = np.geomspace(1 / 64, 1, 25)  # of the largest magnitude: clips and breakpoints that are tried
ROWS = 4096  # of a tensor, at most, that decide its scales
Array = np.ndarray


def rounded(x: Array, scale: float) -> Array:
    """What INT8 codes of a scale stand for."""
    return np.clip(np.rint(x / scale), -HIGH - 1, HIGH) * scale


def clip_of(x: Array) -> float:
    """The range whose codes err least."""
    most = float(np.abs(x).max())
    errors = [np.square(rounded(x, most * step / HIGH) - x).sum() for step in STEPS]
    return most * float(STEPS[int(np.argmin(errors))])


def pieces(x: Array) -> tuple[float, float]:
    """The breakpoint whose two pieces err least, and the largest magnitude beyond it."""
    most, errors = float(np.abs(x).max()), []
    for step in STEPS[:-1]:
        point = most * step
        inside = np.clip(x, -point, point)
        made = rounded(inside, point / HIGH) + rounded(x - inside, (most - point) / HIGH)
        errors.append(np.square(made - x).sum())
    point = most * float(STEPS[int(np.argmin(errors))])
    return point, most - point


class Writer:
    """A float model's products with INT8 operands in one form of the data."""

    def __init__(self, model: Model, nodes: Mapping[str, WeightedNode], seen: Mapping[str, Array], form: str) -> None:
        """Of the plan's nodes and rows of the tensors that they read."""
        self.model, self.nodes, self.seen, self.form = model, nodes, seen, form
        self.made: list[NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self.parts: dict[str, list[tuple[str, str, Array | None]]] = {}  # data, factor behind, channels

    def constant(self, name: str, values: Array) -> str:
        """An initializer, stored once."""
        self.stored.setdefault(name, numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """A node with one output of its own name."""
        self.made.append(helper.make_node(op, list(inputs), [output], output, **attributes))
        return output

    def coded(self, tensor: str, scale: float) -> str:
        """A tensor behind Q and DQ of one scale."""
        inputs = [
            self.constant(f"{tensor}/scale", np.float32(max(scale, 1e-30))),
            self.constant("zero", np.int8(0)),
        ]
        codes = self.add("QuantizeLinear", [tensor, *inputs], f"{tensor}/Q")
        return self.add("DequantizeLinear", [codes, *inputs], f"{tensor}/DQ")

    def by_token(self, tensor: str) -> tuple[str, str]:
        """A tensor with one scale a row, and the scales."""
        axes = self.constant("last", np.asarray([-1]))
        most = self.add("ReduceMax", [self.add("Abs", [tensor], f"{tensor}/Abs"), axes], f"{tensor}/most", keepdims=1)
        scale = self.add("Mul", [most, self.constant("step", np.float32(1 / HIGH))], f"{tensor}/step")
        scale = self.add("Max", [scale, self.constant("least", np.float32(LEAST))], f"{tensor}/rows")
        return self.coded(self.add("Div", [tensor, scale], f"{tensor}/by"), 1.0), scale

    def split(self, tensor: str) -> list[tuple[str, str, Array | None]]:
        """The parts of a tensor whose products are added: name, factor behind the product, channels of the weight."""
        x, form = self.seen[tensor], self.form
        if form == "float":
            return [(tensor, "", None)]
        if form in ("max", "tensor"):
            return [(self.coded(tensor, (float(np.abs(x).max()) if form == "max" else clip_of(x)) / HIGH), "", None)]
        if form == "token":
            return [(*self.by_token(tensor), None)]
        if form == "two words":
            scale = float(np.abs(x).max()) / HIGH
            high = self.coded(tensor, scale)
            rest = self.add("Sub", [tensor, high], f"{tensor}/low")
            return [(high, "", None), (self.coded(rest, scale / 2 / HIGH), "", None)]
        if form == "piecewise":
            point, beyond = pieces(x)
            ends = [self.constant(f"{tensor}/{sign}", np.float32(v)) for sign, v in (("low", -point), ("high", point))]
            inside = self.add("Clip", [tensor, *ends], f"{tensor}/inside")
            rest = self.add("Sub", [tensor, inside], f"{tensor}/beyond")
            return [(self.coded(inside, point / HIGH), "", None), (self.coded(rest, beyond / HIGH), "", None)]
        count = max(1, x.shape[-1] // APART)
        chosen = np.sort(np.argsort(np.abs(x).max(axis=0))[-count:])
        kept = np.ones(x.shape[-1], np.float32)
        kept[chosen] = 0
        usual = self.add("Mul", [tensor, self.constant(f"{tensor}/kept", kept)], f"{tensor}/usual")
        apart = self.add("Gather", [tensor, self.constant(f"{tensor}/chosen", chosen)], f"{tensor}/apart", axis=-1)
        if form == "outliers, token":
            return [(*self.by_token(usual), None), (*self.by_token(apart), chosen)]
        inside, outside = x * kept, x[:, chosen]
        return [
            (self.coded(usual, clip_of(inside) / HIGH), "", None),
            (self.coded(apart, clip_of(outside) / HIGH), "", chosen),
        ]

    def weight(self, node: WeightedNode, channels: Array | None) -> str:
        """Codes with one scale a channel behind a DQ, whole or of some input channels."""
        name = node.weight if channels is None else f"{node.weight}/apart"
        values = self.model.array(node.weight)
        axis = node.output_axis
        scale = np.abs(values).max(axis=node.input_axis) / HIGH
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        codes = np.clip(np.rint(values / np.expand_dims(scale, node.input_axis)), -HIGH, HIGH).astype(np.int8)
        codes = codes if channels is None else np.take(codes, channels, node.input_axis)
        if f"{name}/DQ" not in {n.name for n in self.made}:
            zeros = self.constant(f"{node.weight}/zeros", np.zeros(scale.shape, np.int8))
            inputs = [self.constant(f"{name}/codes", codes), self.constant(f"{node.weight}/scales", scale), zeros]
            self.add("DequantizeLinear", inputs, f"{name}/DQ", axis=axis)
        return f"{name}/DQ"

    def product(self, copy: NodeProto, node: WeightedNode) -> None:
        """The node's products of all parts, added."""
        if node.data not in self.parts:
            self.parts[node.data] = self.split(node.data)
        parts, bias, found = self.parts[node.data], list(copy.input[2:3]), []
        for number, (data, factor, channels) in enumerate(self.parts[node.data]):
            one = NodeProto()
            one.CopyFrom(copy)
            inside = bias if number == 0 and not factor else []
            one.input[:] = [data, self.weight(node, channels), *inside]
            one.output[0] = f"{node.output}/{number}"
            one.name = node.name if number == 0 else f"{node.name}/{number}"
            self.made.append(one)
            found.append(
                self.add("Mul", [one.output[0], factor], f"{one.output[0]}/scaled") if factor else one.output[0]
            )
        found += bias if parts[0][1] else []
        while len(found) > 2:
            found = [self.add("Add", found[:2], f"{found[0]}/sum"), *found[2:]]
        self.add("Add" if len(found) == 2 else "Identity", found, node.output)

    def written(self) -> onnx.ModelProto:
        """The whole model."""
        for node in self.model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            if (weighted := self.nodes.get(node.name)) is not None:
                self.product(copy, weighted)
            else:
                self.made.append(copy)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        used = {name for node in self.made for name in node.input}
        kept = [t for t in proto.graph.initializer if t.name in used]
        del proto.graph.node[:], proto.graph.initializer[:], proto.graph.value_info[:]
        proto.graph.node.extend(self.made)
        proto.graph.initializer.extend([*kept, *self.stored.values()])
        return proto


FORMS = ("max", "tensor", "token", "piecewise", "outliers", "outliers, token", "two words", "float")


def rows_of(model: Model, tensors: Sequence[str], samples: Samples, count: int) -> dict[str, Array]:
    """(rows, channels) of each tensor over some samples, evenly thinned."""
    session, found = Session(model, tensors, threads=1), {tensor: list[Array]() for tensor in tensors}
    for sample in islice(samples, count):
        for tensor, values in session(sample).items():
            found[tensor].append(values.reshape(-1, values.shape[-1]))
    whole = {tensor: np.concatenate(each) for tensor, each in found.items()}
    return {tensor: x[:: max(1, -(-len(x) // ROWS))].astype(np.float64) for tensor, x in whole.items()}


def product_db(model: Model, form: str, nodes: Mapping[str, WeightedNode], seen: Mapping[str, Array]) -> float:
    """SQNR in dB of the median product whose data have a form and whose weights are float."""
    found = []
    for node in nodes.values():
        x, values = seen[node.data], model.array(node.weight).astype(np.float64)
        weight = values if node.input_axis == 0 else values.T
        error = np.square(coded_as(form, x) @ weight - x @ weight).sum()
        found.append(10 * np.log10(np.square(x @ weight).sum() / max(error, 1e-30)))
    return median(found)


def coded_as(form: str, x: Array) -> Array:
    """What data are in a form, in NumPy."""

    def token(part: Array) -> Array:
        scale = np.maximum(np.abs(part).max(axis=1, keepdims=True) / HIGH, LEAST)
        return rounded(part / scale, 1.0) * scale

    most = float(np.abs(x).max())
    if form in ("max", "tensor"):
        return rounded(x, (most if form == "max" else clip_of(x)) / HIGH)
    if form == "token":
        return token(x)
    if form == "two words":
        high = rounded(x, most / HIGH)
        return high + rounded(x - high, most / HIGH / 2 / HIGH)
    if form == "piecewise":
        point, beyond = pieces(x)
        inside = np.clip(x, -point, point)
        return rounded(inside, point / HIGH) + rounded(x - inside, beyond / HIGH)
    if form == "float":
        return x
    apart = np.zeros(x.shape[-1], bool)
    apart[np.argsort(np.abs(x).max(axis=0))[-max(1, x.shape[-1] // APART) :]] = True
    found = np.empty_like(x)
    for part in (apart, ~apart):
        found[:, part] = token(x[:, part]) if "token" in form else rounded(x[:, part], clip_of(x[:, part]) / HIGH)
    return found


def worst_db(
    proto: onnx.ModelProto, expected: Sequence[Mapping[str, Array]], samples: Sequence[dict[str, Array]]
) -> float:
    """SQNR in dB of the worst output of numbers."""
    power: dict[str, float] = {}
    noise: dict[str, float] = {}
    for wanted, got in zip(expected, ort.run(arithmetic.session(proto), samples), strict=True):
        for name, values in wanted.items():
            if values.dtype.kind == "f":
                power[name] = power.get(name, 0) + float(np.square(values, dtype=np.float64).sum())
                noise[name] = noise.get(name, 0) + float(np.square(got[name] - values, dtype=np.float64).sum())
    return min(10 * np.log10(power[name] / max(noise[name], 1e-30)) for name in power)


def compiled(proto: onnx.ModelProto, recipe: Recipe, shapes: Mapping[str, ShapeRange], place: Path) -> tuple[str, ...]:
    """Kernels, share of the multiply-adds in INT8, and predicted microseconds."""
    path = place / "form.onnx"
    onnx.save(proto, path)
    try:
        table = kept_engine(path, recipe=recipe, shapes=shapes).table
    except EngineError as error:
        return ("-", "-", " ".join(str(error).split())[:80])
    found = audit(path, table, shapes=shapes)
    total = sum(node.macs or 0 for node in found.nodes)
    share = sum(node.macs or 0 for node in found.nodes if node.consumed == "int8") / max(total, 1)
    us = predict(path, table, gpus_of(recipe)[0], shapes=shapes).total_us
    return (str(found.kernels), f"{share:.2f}", f"{us:.1f}")


def lines(given: argparse.Namespace) -> Iterator[str]:
    """The table."""
    model = load_float(given.model)
    specs = input_specs(model)
    data, evaluation = (open_samples(str(source), specs) for source in (given.data, given.eval))
    plan = placement.plan(model, Settings(shift=False))
    nodes = {n: w for n, w in weighted_nodes(model, plan).items() if w.op_type in ("MatMul", "Gemm") and w.data_spec}
    seen = rows_of(model, list(dict.fromkeys(node.data for node in nodes.values())), data, given.count)
    samples = list(islice(evaluation, given.count))
    expected = list(ort.run(arithmetic.session(model.proto, directory=model.directory), samples))
    shapes = {name: ShapeRange.fixed(shape.opt) for name, shape in shape_ranges(model, (), data).items()}
    recipe = Recipe.from_mapping({"gpu": given.gpu})
    yield f"{Path(given.model).name}, {len(nodes)} products, {len(samples)} samples, {given.gpu}\n"
    heads = ("data", "SQNR dB, worst output", "median product", "kernels", "INT8 share", "predicted us")
    yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    with tempfile.TemporaryDirectory() as place:
        for form in given.forms:
            proto = Writer(model, nodes, seen, form).written()
            alone = "-" if form == "float" else f"{product_db(model, form, nodes, seen):.1f}"
            cells = ("-", "-", "-") if given.no_compile else compiled(proto, recipe, shapes, Path(place))
            yield f"| {form} | {worst_db(proto, expected, samples):.1f} | {alone} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table of one network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="samples that decide scales")
    parser.add_argument("--eval", required=True, help="other samples, to score on")
    parser.add_argument("--count", type=int, default=16, help="samples of each, at most; default 16")
    parser.add_argument("--gpu", default="rtx4090")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, metavar="FORM")
    parser.add_argument("--no-compile", action="store_true", help="accuracy alone")
    for line in lines(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    record(main)
