"""Write Q/DQ nodes, integer weights and shift corrections into a graph.

Model + Plan + Solution -> Model: each activation point gets QuantizeLinear and DequantizeLinear in front of its
consumers, each weight becomes codes behind a DequantizeLinear. It must not choose anything.

| case | in front of the operand | behind the node |
|---|---|---|
| any, equalized | first Mul by 1 / channel scales, unless carriers hold them (`absorb`) | nothing: the codes of W do |
| A symmetric | Q, DQ | nothing |
| B shifted, no padding | Sub c, Q, DQ | bias += c * sum(W) |
| C shifted, padded Conv | Pad with 0, Sub c, Q, DQ; the Conv's own pads become 0 | bias += c * sum(W) |
| E Conv, channels per group no multiple of 4 | as C, the Pad adds zero channels, the weight zero codes | as A to C |
| F as E, with several groups | Reshape to (N, groups, channels, ...) before the Pad and back behind it | as A to C |
| D shifted, shortcut of an Add | Sub c, Q, DQ, Add c | nothing |
| G weight-only | nothing | nothing |
| H blocks that do not divide the reduction axis | first Pad with zeros; the weight has zero codes there | as A to G |
| I one scale per token | Div by s = max abs over the last axis / 127, Q and DQ of scale 1 | Mul by s, then the bias |
| N data in two codes | A; and of what A leaves: Sub, Q, DQ of 1/256 of its scale | the same product of that, Add |
| O two pieces | Clip to +-p; the rest: Sub; Q and DQ each | a second product of the rest; Add of both |
| J two-level weight (instead of codes and DQ) | DQ of the blocks, Q and DQ of INT8 per channel | as A to I |
| K NVFP4, weight and data | data: first TRT_FP4DynamicQuantize; DQ of the block scales, DQ of the blocks | nothing |
| M a table that a Gather reads | codes and DQ of its rows, or of their blocks | nothing |
| L in a body of If, Loop or Scan | as A to K, in the body; codes and scales are in the main graph | as A to K |

TensorRT reads zero point 0 only; c = -zero_point * scale makes the same codes as a zero point would, and 0 keeps an
exact code. On TensorRT-RTX Pad, Sub and Q fuse into the kernel that produced the tensor (measured: the same number of
kernels, 0 to 3 % more bytes in 2-D, to 12 % on small 3-D tensors). Case E: its INT8 convolutions read channels in
fours; left to itself the compiler stores a constant of zeros as large as the tensor (the weights of a 5-channel 3-D
network grew 320 times; SM89). Case F needs static spatial sizes, else nothing is added. Case I runs as three kernels
with an integer product in between, and case J stores 4-bit weights that one kernel unpacks to INT8 (measured). Blocks
are never put in front of an integer product without case J: TensorRT-RTX then multiplies the block scales in behind the
sum over all blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from engines.backends.profile import Profile
from qdq.assemble.borders import Border, OperandWriter, Rows, border, missing_channels, reflected, rows
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams
from qdq.model.made_for import mark
from qdq.model.model import Model
from qdq.model.nodes import FP4_QUANTIZE, TRT_DOMAIN, bodies, controls
from qdq.model.shift_correction import correct, weight_sums
from qdq.passes.draft import assign
from qdq.passes.rewrites.edit import altered
from qdq.plan.plan import Plan, Point
from qdq.plan.weighted_node import WeightedNode, by_data
from qdq.solve.equalize.carriers import CarryingConstant
from qdq.solve.equalize.pieces import breakpoint_of
from qdq.solve.solve import Solution

LEAST_TOKEN_SCALE = 2.0**-14  # FP16's smallest normal number: a smaller scale would lose digits, or be zero


def insert(model: Model, plan: Plan, solution: Solution) -> Model:
    """The Q/DQ model of a prepared float model, with the parameters of a solution at every point of a plan.

    Tensor names of the float model stay, new ones are `<tensor>_QuantizeLinear`, `<tensor>_scale` and so on. The same
    arguments give the same bytes. The model says which compiler it is for (`made_for`).
    """
    writer = _Writer(model, solution, plan.settings.profile)
    operands = {(name, index): point for point in (*plan.points, *plan.tables) for name, index in point.uses}
    for node in model.graph.node:
        writer.node(node, operands)
    coded = (*solution.weights.values(), *(solution.tables.codes[point.tensor] for point in plan.tables))
    params = (*solution.activations.values(), *(w.params for w in coded))
    opset = max((FORMATS[p.format].minimum_opset for p in params), default=0)
    proto = writer.finish(opset)
    mark(proto, plan.settings.compiler)
    return model.replace(proto, keeps=solution.store)


class _Writer(OperandWriter):
    """The cases of the table, node after node."""

    def __init__(self, model: Model, solution: Solution, profile: Profile) -> None:
        super().__init__(model, solution.store)
        self._profile, self._solution = profile, solution
        self._readers = by_data(solution.nodes.values())
        self._deep: dict[str, int] = {}  # output of a MatMul of integer codes -> its rank, where that is 3 or more
        self._carried: dict[str, list[tuple[str, CarryingConstant]]] = {}
        for tensor, carrier in solution.carriers.items():
            for operand in carrier.operands:
                self._carried.setdefault(operand.node, []).append((tensor, operand))

    def node(self, node: NodeProto, operands: dict[tuple[str, int], Point]) -> None:
        """Append one node of the float model, rewired where the plan says so."""
        weighted, copy = self._solution.nodes.get(node.name), self._carrying(node)
        if controls(node):
            for body in bodies(copy):
                self._body(body, operands)
        if weighted is None:
            for index in range(len(node.input)):
                if (point := operands.get((node.name, index))) is not None:
                    read = self._table if point.role == "table" else self._shortcut
                    copy.input[index] = read(point.tensor)
        elif weighted.data_spec is None:  # weight-only
            copy.input[0] = self._padded(weighted.data, self._divided(weighted.data), self._rows(weighted))
            copy.input[1] = self._weight(weighted, 0)
        elif weighted.data in self._solution.tokens:
            return self._per_token(weighted, copy.input[2] if weighted.bias else "")
        elif weighted.data in self._solution.beyond:
            return self._in_pieces(copy, weighted)
        else:
            return self._product(copy, weighted, operands[node.name, 1], operands[node.name, 0].spec.residual)
        self._nodes.append(copy)

    def _body(self, body: GraphProto, operands: dict[tuple[str, int], Point]) -> None:
        """Rewire the nodes of a body; what quantizes and dequantizes for them is made in it anew.

        Behind a DQ outside of an If its products run in float (measured with TensorRT-RTX 1.7.1, SM86 and SM89).
        """
        nodes, made = self._nodes, self._made
        self._nodes, self._made = [], {}
        for node in body.node:
            self.node(node, operands)
        assign(body.node, self._nodes)
        self._nodes, self._made = nodes, made

    def _product(self, copy: NodeProto, weighted: WeightedNode, weight: Point, twice: bool) -> None:
        """A node whose data and weight are quantized, the data twice or with the correction for their shift."""
        params = self._solution.activations[weighted.data]
        channels = missing_channels(self._model, weighted, self._profile)
        pads = weighted.window.pads if weighted.window and (params.zero_point or channels) else ()
        around = border(self._model, weighted, pads, channels) if weighted.window else self._rows(weighted)
        copy.input[0] = self._activation(weighted.data, params, around)
        copy.input[1] = self._weight(weighted, channels)
        if any(pads):
            next(a for a in copy.attribute if a.name == "pads").ints[:] = [0] * len(pads)
        self._nodes.append(copy)
        if twice:
            self._again(copy, weighted, params, around)
        if params.zero_point:
            self._correct(copy, weight, params)
        rank = self._model.rank(weighted.output) or 0
        if copy.op_type == "MatMul" and rank > 2 and FORMATS[params.format].integer:
            self._deep[copy.output[0]] = rank

    def _again(self, copy: NodeProto, weighted: WeightedNode, params: QParams, around: Border | Rows | None) -> None:
        """Case N: x W = q W + (x - q) W for the values q of the codes of x, the same codes of W in both products."""
        tensor, output, key = weighted.data, copy.output[0], (weighted.data, around, "rest")
        if key not in self._made:
            source = self._padded(tensor, self._divided(tensor), around)
            rest = self._append("Sub", (source, copy.input[0]), f"{tensor}_rest")
            self._made[key] = self._coded(
                rest, QParams(scale=params.scale / np.float32(256), format=params.format), tensor
            )
        second = altered(copy)
        second.name, second.input[:] = self._name(f"{copy.name}_rest"), [self._made[key], copy.input[1]]
        copy.output[0], second.output[0] = parts = self._name(f"{output}_coarse"), self._name(f"{output}_rest")
        self._nodes += [second, helper.make_node("Add", parts, [output], self._name(f"{copy.name}_rest_Add"))]

    def finish(self, opset: int) -> ModelProto:
        """The new model; a constant added to a product of rank 3 or more has that rank.

        Of a vector behind such a MatMul, ONNX Runtime makes a Reshape and a Gemm, and 1.31 and 1.32 move the quantizer
        in front across the Reshape, by a QuantizeLinear that they refuse from opset 21 on.
        """
        for node in self._nodes:
            if node.op_type != "Add" or (rank := max(self._deep.get(name, 0) for name in node.input)) == 0:
                continue
            for index, name in enumerate(node.input):
                new, old = self._constants.get(name), self._model.initializers.get(name)
                stored = new or old
                if stored is not None and len(stored.dims) < rank:
                    values = numpy_helper.to_array(new) if new else self._model.array(name)
                    values = values.reshape(*(1,) * (rank - values.ndim), *values.shape)
                    node.input[index] = self._constant(f"{name}_rank_{rank}", values)
                    self._constants.pop(name, None)  # a correction, which nothing else reads
        return super().finish(opset)

    def _carrying(self, node: NodeProto) -> NodeProto:
        """A copy of a node whose constants hold the factors of a tensor made from its output."""
        copy = altered(node)
        for tensor, operand in self._carried.get(node.name, ()):
            if operand.index == 1 and node.name in self._solution.nodes:
                continue  # its codes hold them
            values = self._model.array(node.input[operand.index])
            values = operand.times(values, 1 / self._solution.divisors[tensor].astype(np.float64))
            write = self._codes if values.ndim > 1 and operand.index == 1 else self._constant
            copy.input[operand.index] = write(f"{node.input[operand.index]}_divided", values)
        return copy

    def _rows(self, node: WeightedNode) -> Rows | None:
        """Case H: what the last block of a product's weight lacks."""
        return rows(node, self._solution.weights[node.key].params)

    def _per_token(self, node: WeightedNode, bias: str) -> None:
        """Case I: x W = s (round(x / s) W) for the scale s of each row of x; a Gemm becomes the MatMul that it is."""
        tensor, output, rows = node.data, node.output, self._rows(node)
        key = (tensor, rows, "token")
        if key not in self._made:
            fmt, dtype = FORMATS[self._solution.activations[tensor].format], self._model.dtype(tensor)
            source = self._divided(tensor)
            size = self._append("Abs", (source,), f"{tensor}_Abs")
            axes = self._constant(f"{tensor}_axes", np.array([-1], dtype=np.int64))
            size = self._append("ReduceMax", (size, axes), f"{tensor}_ReduceMax", keepdims=1)
            step = self._constant(f"{tensor}_step", np.asarray(1 / fmt.high), dtype)
            size = self._append("Mul", (size, step), f"{tensor}_token_Mul")
            least = self._constant(f"{tensor}_least", np.asarray(LEAST_TOKEN_SCALE), dtype)
            scale = self._append("Max", (size, least), f"{tensor}_token_scale")  # a row of zeros stays zero
            source = self._append("Div", (source, scale), f"{tensor}_Div")
            source = self._padded(tensor, source, rows)
            one, zero = self._scale(tensor, self._solution.activations[tensor])
            codes = self._append("QuantizeLinear", (source, one, zero), f"{tensor}_QuantizeLinear")
            self._made[key] = self._append("DequantizeLinear", (codes, one, zero), f"{tensor}_DequantizeLinear")
            self._made[*key, "scale"] = scale
        product = self._name(f"{output}_per_token")
        inputs = [self._made[key], self._weight(node, 0, flip=node.output_axis == 0)]
        self._nodes.append(helper.make_node("MatMul", inputs, [product], name=node.name))
        name = self._name(f"{node.name}_token_Mul")
        scaled = self._name(f"{output}_scaled") if bias else output
        self._nodes.append(helper.make_node("Mul", [product, self._made[*key, "scale"]], [scaled], name=name))
        if bias:
            self._nodes.append(helper.make_node("Add", [scaled, bias], [output], self._name(f"{node.name}_token_Add")))

    def _in_pieces(self, copy: NodeProto, node: WeightedNode) -> None:
        """Case O: W x = W clip(x, -p, p) + W (x - clip(x, -p, p)); the bias is added once."""
        tensor, output, rows = node.data, node.output, self._rows(node)
        key = (tensor, rows, "pieces")
        if key not in self._made:
            inside, source = self._solution.activations[tensor], self._padded(tensor, self._divided(tensor), rows)
            end, dtype = np.asarray(breakpoint_of(inside)), self._model.dtype(tensor)
            limits = (self._constant(f"{tensor}_limit", sign * end, dtype) for sign in (-1, 1))
            middle = self._append("Clip", (source, *limits), f"{tensor}_inside")
            rest = self._append("Sub", (source, middle), f"{tensor}_beyond")
            self._made[key] = self._coded(middle, inside, tensor)
            self._made[*key, "beyond"] = self._coded(rest, self._solution.beyond[tensor], tensor)
        weight, made = self._weight(node, 0), list[str]()
        for data in (self._made[key], self._made[*key, "beyond"]):
            product = altered(copy, output=self._name(f"{output}_{'beyond' if made else 'inside'}"))
            product.input[:] = [data, weight, *(copy.input[2:] if not made else ())]
            product.name = self._name(f"{node.name}_beyond") if made else node.name
            made.append(product.output[0])
            self._nodes.append(product)
        self._nodes.append(helper.make_node("Add", made, [output], self._name(f"{node.name}_pieces_Add")))

    def _activation(self, tensor: str, params: QParams, around: Border | Rows | None) -> str:
        """Cases A, B, C, E, F and H: the dequantized tensor, made once per tensor and what is around it."""
        key = (tensor, around)
        if key in self._made:
            return self._made[key]
        if FORMATS[params.format].scale_format:
            return self._made.setdefault(key, self._in_blocks(tensor, params, around))
        source = base = self._padded(tensor, self._divided(tensor), around)
        if params.zero_point:
            source = self._append("Sub", (source, self._offset(tensor, params)), f"{base}_Sub")
        elif reflected(self._model, tensor):
            nothing = self._constant(f"{tensor}_nothing", np.zeros(()), self._model.dtype(tensor))
            source = self._append("Add", (source, nothing), f"{base}_Add")
        scale, zero = self._scale(tensor, params)
        codes = self._append("QuantizeLinear", (source, scale, zero), f"{base}_QuantizeLinear")
        self._made[key] = self._append("DequantizeLinear", (codes, scale, zero), f"{base}_DequantizeLinear")
        return self._made[key]

    def _in_blocks(self, tensor: str, params: QParams, around: Border | Rows | None) -> str:
        """Case K, data: codes and block scales are computed as the engine runs, the scale of these scales is not."""
        fmt, dtype = FORMATS[params.format], self._model.dtype(tensor)
        grid = FORMATS[fmt.scale_format]
        source = self._padded(tensor, self._divided(tensor), around)
        scale = self._constant(f"{tensor}_tensor_scale", params.scale)  # float32 whatever the data are
        codes, scales = self._name(f"{tensor}_codes"), self._name(f"{tensor}_block_codes")
        blocks: dict[str, Any] = {"axis": -1, "block_size": fmt.blocks[0]}
        name, attributes = self._name(f"{tensor}_{FP4_QUANTIZE}"), {**blocks, "scale_type": grid.onnx_type}
        made = helper.make_node(FP4_QUANTIZE, [source, scale], [codes, scales], name, domain=TRT_DOMAIN, **attributes)
        self._nodes.append(made)
        self._typed += [(codes, fmt.onnx_type, tensor), (scales, grid.onnx_type, tensor)]
        if dtype != "float32":
            scale = self._constant(f"{tensor}_{dtype}_scale", params.scale, dtype)
        real = self._append("DequantizeLinear", (scales, scale), f"{scales}_DequantizeLinear")
        return self._append("DequantizeLinear", (codes, real), f"{codes}_DequantizeLinear", **blocks)

    def _divided(self, tensor: str) -> str:
        """The tensor with its channels divided, made once; the tensor itself where nothing is to be divided."""
        divisor = self._solution.divisors.get(tensor)
        if divisor is None or tensor in self._solution.carriers:
            return tensor
        if (tensor, "divided") not in self._made:
            shape = (-1, *(1,) * self._readers[tensor][0].spatial)
            factor = self._constant(f"{tensor}_factor", (1 / divisor).reshape(shape), self._model.dtype(tensor))
            self._made[tensor, "divided"] = self._append("Mul", (tensor, factor), f"{tensor}_Mul")
        return self._made[tensor, "divided"]

    def _shortcut(self, tensor: str) -> str:
        """Case D: the dequantized tensor with the shift taken back."""
        params = self._solution.activations[tensor]
        value = self._activation(tensor, params, None)
        if params.zero_point and (tensor, "unshifted") not in self._made:
            made = self._append("Add", (value, self._offset(tensor, params)), f"{tensor}_unshifted")
            self._made[tensor, "unshifted"] = made
        return self._made[tensor, "unshifted"] if params.zero_point else value

    def _scale(self, tensor: str, params: QParams) -> tuple[str, str]:
        if (tensor, "scale") not in self._made:
            zero = np.zeros((), dtype=FORMATS[params.format].dtype)
            self._made[tensor, "scale"] = self._constant(f"{tensor}_scale", params.scale, self._model.dtype(tensor))
            self._made[tensor, "zero"] = self._constant(f"{tensor}_zero_point", zero)
        return self._made[tensor, "scale"], self._made[tensor, "zero"]

    def _offset(self, tensor: str, params: QParams) -> str:
        if (tensor, "offset") not in self._made:
            offset = np.asarray(params.offset, dtype=np.float32)
            self._made[tensor, "offset"] = self._constant(f"{tensor}_offset", offset, self._model.dtype(tensor))
        return self._made[tensor, "offset"]

    def _weight(self, node: WeightedNode, channels: int, *, flip: bool = False) -> str:
        """Codes behind a DequantizeLinear, made once per weight, axis and number of added input channels.

        With `flip` a matrix is written transposed. Of codes that a table has, the compiler keeps one copy.
        """
        tensor, key = node.weight, (*node.key, "weight", channels, flip)
        if key not in self._made and (table := self._solution.tables.shared.get(node.key)):
            made = self._table(table)
            turned = flip != (table != tensor)
            self._made[key] = self._append("Transpose", (made,), f"{tensor}_Transpose", perm=[1, 0]) if turned else made
        if key not in self._made:
            quantized = self._solution.weights[node.key]
            params, compute_params = quantized.params, quantized.compute_params
            values, scales, axis = quantized.codes, params.scale, params.axis or 0
            if channels:
                values = np.pad(values, [(0, channels if i == 1 else 0) for i in range(values.ndim)])
            if flip:
                values, axis = values.T, 1 - axis
                scales = scales.T if scales.ndim == values.ndim else scales
            codes = self._codes(f"{tensor}_quantized", np.ascontiguousarray(values))
            dtype = self._model.dtype(tensor)
            extra = {"block_size": params.block} if params.block else {}
            stack = node.op_type == "MatMul" and values.ndim > 2
            inputs = [codes, *self._weight_scale(tensor, scales, None if stack else values.dtype, dtype, params)]
            made = self._append("DequantizeLinear", inputs, f"{tensor}_DequantizeLinear", axis=axis, **extra)
            if compute_params is not None:
                assert compute_params.axis is not None
                axis = 1 - compute_params.axis if flip else compute_params.axis
                scale = self._constant(f"{tensor}_channel_scale", compute_params.scale, dtype)
                zeros = np.zeros(compute_params.scale.shape, dtype=FORMATS[compute_params.format].dtype)
                zero = self._constant(f"{tensor}_channel_zero_point", zeros)
                made = self._append("QuantizeLinear", (made, scale, zero), f"{tensor}_QuantizeLinear", axis=axis)
                made = self._append("DequantizeLinear", (made, scale, zero), f"{made}_DequantizeLinear", axis=axis)
            self._made[key] = made
        return self._made[key]

    def _table(self, tensor: str) -> str:
        """Case M, made once per table."""
        if (tensor, "table") not in self._made:
            coded = self._solution.tables.codes[tensor]
            params, dtype = coded.params, self._model.dtype(tensor)
            codes = self._codes(f"{tensor}_quantized", np.ascontiguousarray(coded.codes))
            inputs = [codes, *self._weight_scale(tensor, params.scale, coded.codes.dtype, dtype, params)]
            extra = {"block_size": params.block} if params.block else {}
            made = self._append("DequantizeLinear", inputs, f"{tensor}_DequantizeLinear", axis=params.axis, **extra)
            self._made[tensor, "table"] = made
        return self._made[tensor, "table"]

    def _weight_scale(
        self,
        tensor: str,
        scale: npt.NDArray[np.float32],
        codes: np.dtype[np.generic] | None,
        dtype: str,
        params: QParams,
    ) -> list[str]:
        """Scale and zero point of a weight's codes.

        Blocks need no zero point, for its type is that of the codes. A stack of matrices must have none (`codes` is
        None): ONNX Runtime 1.32 fuses its product and then refuses a vector of them (MatMulIntegerToFloat).
        """
        if params.second is not None:
            grid = FORMATS[FORMATS[params.format].scale_format]
            stored = (scale / np.float32(params.second)).astype(grid.dtype)
            second = self._constant(f"{tensor}_tensor_scale", np.asarray(params.second), dtype)
            inputs = (self._codes(f"{tensor}_block_codes", np.ascontiguousarray(stored)), second)
            return [self._append("DequantizeLinear", inputs, f"{tensor}_block_scale")]
        if params.block is None and codes is not None:
            zeros = np.zeros(scale.shape, dtype=codes)
            return [self._constant(f"{tensor}_scale", scale, dtype), self._constant(f"{tensor}_zero_point", zeros)]
        return [self._constant(f"{tensor}_scale", np.ascontiguousarray(scale), dtype)]

    def _correct(self, node: NodeProto, point: Point, params: QParams) -> None:
        """Add c * sum(W) to a node whose data operand was shifted by c."""
        quantized, dtype = self._solution.weights[point.tensor, point.spec.axis], self._model.dtype(point.tensor)
        added = correct(
            node,
            np.asarray(params.offset * weight_sums(quantized, node)),
            quantized.codes.ndim,
            stored=self._stored,
            constant=lambda name, values: self._constant(name, values, dtype),
            fresh=self._name,
        )
        self._nodes.extend([added] if added is not None else [])
