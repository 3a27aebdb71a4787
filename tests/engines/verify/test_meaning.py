"""What outputs are taken for, and the axis of their classes, by how the graph ends: each row of the module's table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.core import onnx_runtime as ort
from engines.verify.compare import compare
from engines.verify.meaning import FirstSample, Meaning, meanings
from engines.verify.report import OutputReport

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


class Net(graphs.Graph):
    """A graph with one input `x`; `last` is the tensor that the next node reads."""

    def __init__(self, shape: Sequence[int], seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.shape, self.last = tuple(shape), "x"

    def then(self, op_type: str, *others: str, **attributes: object) -> Net:
        """Append a node that reads the last tensor, then the others."""
        self.last = self.add(op_type, [self.last, *others], name=f"n{len(self.nodes)}", **attributes)
        return self

    def stored(self, *shape: int) -> str:
        """A random weight."""
        return self.init(f"w{len(self.initializers)}", self.rng.normal(size=shape).astype(np.float32) / 2)

    def ints(self, *values: int) -> str:
        return self.init(f"i{len(self.initializers)}", np.asarray(values, np.int64))

    def conv(self, given: int, made: int, axes: int = 2, **attributes: object) -> Net:
        kernel = (3,) * axes if "strides" not in attributes else (2,) * axes
        pads = [1] * 2 * axes if "strides" not in attributes else [0] * 2 * axes
        return self.then("Conv", self.stored(made, given, *kernel), pads=pads, **attributes)

    def matmul(self, given: int, made: int) -> Net:
        return self.then("MatMul", self.stored(given, made)).then("Add", self.stored(made))

    def model(self, *more: str, opset: int = 21, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """Outputs are the last tensor and the others named."""
        outputs = [onnx.ValueInfoProto(name=n) for n in (self.last, *more)]
        for info in outputs:
            info.type.tensor_type.elem_type = kind
        graph = helper.make_graph(self.nodes, "tiny", [graphs.value("x", self.shape)], outputs, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def meaning(net: Net, *, task: str = "auto", class_axis: int | None = None, opset: int = 21) -> Meaning:
    """Of the last tensor."""
    model = net.model(opset=opset)
    x = np.random.default_rng(1).normal(size=net.shape).astype(np.float32)
    (outputs,) = ort.run(model, [{"x": x}])
    seen = FirstSample(inputs={"x": net.shape}, outputs=outputs)
    return meanings(model, seen, task=task, class_axis=class_axis)[net.last]


def segmenter(*, axes: int = 2, last: bool = False) -> Net:
    """One channel in, five out; channels last behind transpositions where asked."""
    size = (6, 7, 5)[:axes]
    if not last:
        return Net((1, 1, *size)).conv(1, 4, axes).then("Relu").conv(4, 5, axes)
    net = Net((1, *size, 1)).then("Transpose", perm=[0, axes + 1, *range(1, axes + 1)])
    return net.conv(1, 4, axes).conv(4, 5, axes).then("Transpose", perm=[0, *range(2, axes + 2), 1])


def heads() -> dict[str, tuple[Callable[[], Net], str, int | None, bool | None]]:
    """Name -> net, task, axis, masks."""
    seg, cls, num = "segmentation", "classification", "regression"
    yolo = [1, 2, 5, 4, 4]
    return {
        "softmax": (lambda: Net((2, 8)).matmul(8, 3).then("Softmax", axis=-1), cls, 1, False),
        "scores of a product": (lambda: Net((2, 8)).matmul(8, 3), cls, 1, False),
        "scaled scores": (lambda: _halved(Net((2, 8)).matmul(8, 3)), cls, 1, False),
        "frames": (lambda: Net((1, 6, 8)).matmul(8, 11), num, None, None),
        "logits in rows": (lambda: _reshaped(segmenter(last=True), [1, 42, 5]), cls, 2, False),
        "scores of a pool": (
            lambda: Net((1, 3, 8, 8)).conv(3, 10).then("GlobalAveragePool").then("Flatten"),
            cls,
            1,
            False,
        ),
        "logits of an image": (lambda: segmenter(), seg, 1, False),
        "logits of a volume": (lambda: segmenter(axes=3), seg, 1, False),
        "channels last": (lambda: segmenter(last=True), seg, 3, False),
        "channels last, softmax": (lambda: segmenter(last=True).then("Softmax", axis=-1), seg, 3, False),
        "enlarged": (
            lambda: _resized(Net((1, 1, 8, 8)).conv(1, 6, strides=[2, 2]).conv(6, 4), 2),
            seg,
            1,
            False,
        ),
        "masks": (lambda: segmenter().then("Sigmoid"), seg, 1, True),
        "one mask": (lambda: Net((1, 3, 8, 8)).conv(3, 1).then("Sigmoid"), seg, 1, True),
        "logits beside a shortcut": (lambda: _beside(segmenter(axes=3), axes=3), seg, 1, False),
        "masks beside a shortcut": (lambda: _beside(segmenter()).then("Sigmoid"), seg, 1, True),
        "a correction of the image": (lambda: Net((1, 2, 6, 7, 5)).conv(2, 2, 3).then("Add", "x"), num, None, None),
        "image to image": (lambda: Net((1, 3, 8, 8)).conv(3, 4).conv(4, 3), num, None, None),
        "image by sigmoid": (lambda: Net((1, 3, 8, 8)).conv(3, 4).conv(4, 3).then("Sigmoid"), num, None, None),
        "image by tanh": (lambda: Net((1, 1, 8, 8)).conv(1, 3).then("Tanh"), num, None, None),
        "features": (lambda: Net((1, 3, 8, 8)).conv(3, 16, strides=[2, 2]), num, None, None),
        "turned features": (lambda: Net((1, 6, 8)).matmul(8, 8), num, None, None),
        "boxes": (lambda: Net((1, 6, 8)).matmul(8, 4), num, None, None),
        "boxes by sigmoid": (lambda: Net((1, 6, 8)).matmul(8, 4).then("Sigmoid"), num, None, None),
        "detection grid": (
            lambda: _reshaped(Net((1, 3, 8, 8)).conv(3, 10, strides=[2, 2]), yolo).then("Sigmoid"),
            num,
            None,
            None,
        ),
        "an energy": (lambda: Net((4, 8)).matmul(8, 1), num, None, None),
        "a pitch per frame": (lambda: _reshaped(Net((6, 8)).matmul(8, 1), [1, 6]), num, None, None),
        "confidence per frame": (lambda: _reshaped(Net((6, 8)).matmul(8, 1), [1, 6]).then("Sigmoid"), num, None, None),
        "attention": (lambda: _attention(), num, None, None),
        "norm": (lambda: Net((1, 6, 8)).matmul(8, 5).then("Relu"), num, None, None),
    }


def _resized(net: Net, factor: int) -> Net:
    net.last = net.add(
        "Resize", [net.last, "", net.init("s", np.asarray([1, 1, factor, factor], np.float32))], name="up"
    )
    return net


def _beside(net: Net, axes: int = 2) -> Net:
    """A residual block of five channels without a name for them behind it."""
    before = net.then("Relu").last
    return net.conv(5, 5, axes).then("Add", before)


def _halved(net: Net) -> Net:
    return net.then("Mul", net.init("half", np.float32(0.5)))


def _reshaped(net: Net, shape: Sequence[int]) -> Net:
    return net.then("Reshape", net.ints(*shape))


def _attention() -> Net:
    """Softmax of x x^T, whose result multiplies x: the weights are the output."""
    net = Net((1, 6, 6))
    net.then("MatMul", "x").then("Softmax", axis=-1)
    weights = net.last
    net.then("MatMul", "x")
    net.last = weights
    return net


@pytest.mark.parametrize("name", heads())
def test_the_end_of_the_graph_says_what_an_output_is(name: str) -> None:
    build, task, axis, masks = heads()[name]
    found = meaning(build())
    assert (found.task, found.axis, found.masks) == (task, axis, masks), found.why
    assert found.why


def test_a_softmax_before_opset_13_flattens() -> None:
    flat = Net((1, 1, 4, 4)).conv(1, 3)
    assert meaning(flat.then("Softmax", axis=1), opset=11).task == "regression"  # over positions too: no classes
    rows = Net((2, 8)).matmul(8, 3).then("Softmax", axis=1)
    assert meaning(rows, opset=11).axis == 1


def test_parts_that_are_joined_must_be_of_one_kind() -> None:
    def joined(second: str) -> Net:
        net = Net((1, 6, 8))
        first = net.matmul(8, 5).then("Softmax", axis=-1).last
        net.last = "x"
        other = net.matmul(8, 5).then(second).last
        net.last = net.add("Concat", [first, other], name="joined", axis=1)
        return net

    assert meaning(joined("Softmax")).axis == 2 and meaning(joined("Softmax")).task == "classification"
    assert meaning(joined("Relu")).task == "regression"


def test_values_that_sum_to_one_are_classes_where_the_graph_does_not_say() -> None:
    net = Net((2, 8)).matmul(8, 3).then("Exp")
    exp = net.last
    total = net.then("ReduceSum", net.ints(1)).last
    net.last = net.add("Div", [exp, total], name="share")
    found = meaning(net)
    assert (found.task, found.axis) == ("classification", 1) and "sum to 1" in found.why
    seen = FirstSample(inputs={}, outputs={"y": np.asarray([[0.25, 0.75]]), "z": np.asarray([[1.0, 2.0]])})
    assert {n: m.task for n, m in meanings(None, seen).items()} == {"y": "classification", "z": "regression"}


def test_what_is_asked_for_goes_before_the_evidence() -> None:
    image = Net((1, 3, 8, 8)).conv(3, 4).conv(4, 3)
    asked = meaning(image, task="segmentation")
    assert (asked.task, asked.axis) == ("segmentation", 1) and "a guess" in asked.why
    assert meaning(image, task="segmentation", class_axis=-1).axis == 3
    assert meaning(segmenter(), task="regression").axis is None
    assert meaning(segmenter(), class_axis=2).axis == 2
    assert meaning(segmenter(), class_axis=9).task == "regression"
    assert meaning(image, class_axis=1).task == "regression"  # an axis alone is no evidence of classes
    assert meaning(Net((4, 8)).matmul(8, 1).then("Squeeze"), task="classification").task == "regression"  # rank 1
    other = Net((1, 8, 8, 2)).then("Transpose", perm=[0, 3, 1, 2]).conv(2, 3).then("Tanh")
    other.then("Transpose", perm=[0, 2, 3, 1])
    guessed = meaning(other, task="segmentation")
    assert guessed.axis == 3 and "only axis that is not as in the input" in guessed.why


@pytest.mark.parametrize(
    ("kind", "dtype", "task"),
    [("codes", np.uint8, "regression"), ("quantized", np.uint8, "regression"), ("argmax", np.int64, "labels")],
)
def test_integers_are_numbers_where_they_are_made_of_numbers(kind: str, dtype: type, task: str) -> None:
    net = Net((1, 3, 8, 8)).conv(3, 3)
    if kind == "codes":
        net.then("Clip", net.init("low", np.float32(0)), net.init("high", np.float32(9))).then(
            "Cast", to=TensorProto.UINT8
        )
    elif kind == "quantized":
        net.then("QuantizeLinear", net.init("s", np.float32(0.1)), net.init("z", np.uint8(128)))
    else:
        net.then("ArgMax", axis=1)
    model = net.model(kind=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    (outputs,) = ort.run(model, [{"x": np.ones(net.shape, np.float32)}])
    assert meanings(model, FirstSample(inputs={"x": net.shape}, outputs=outputs))[net.last].task == task


def row(net: Net, noise: float, *, kind: int = TensorProto.FLOAT, **options: object) -> OutputReport:
    """The output of a net against that of a net with other weights: all stored floats are scaled by 1 + noise."""
    model, other = net.model(kind=kind), net.model(kind=kind)
    rng = np.random.default_rng(3)
    for tensor in other.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                graphs.const(tensor.name, (values + noise * rng.normal(size=values.shape)).astype(np.float32))
            )
    data = [{"x": rng.normal(size=net.shape).astype(np.float32)} for _ in range(6)]
    (found,) = compare(model, other, iter(data), **options).outputs
    return found


def test_classes_of_channels_last_are_no_image_rows() -> None:
    found, first = row(segmenter(last=True), 0.1), row(segmenter(), 0.1)
    assert set(found.dice) == set(first.dice) == set(range(5)) and found.class_axis == 3
    rows = row(segmenter(last=True), 0.1, task="segmentation", class_axis=1)
    assert len(rows.dice) == 6  # what was reported as classes: rows of the image
    assert min(found.dice.values()) < 0.97 and found.top1 is not None and found.top1 < 1


@pytest.mark.parametrize("name", ["image to image", "boxes", "a pitch per frame", "detection grid", "an energy"])
def test_outputs_of_numbers_have_no_dice_and_no_argmax(name: str) -> None:
    found = row(heads()[name][0](), 0.05)
    assert found.dice == {} and found.top1 is None and found.sqnr_db is not None and found.class_axis is None


@pytest.mark.parametrize(("made", "task", "axis"), [(11, "classification", 2), (8, "regression", None)])
def test_scores_of_tokens_are_classes_and_features_of_tokens_are_not(made: int, task: str, axis: int | None) -> None:
    net = Net((1, 6))
    net.last = net.add("Gather", [net.stored(9, 8), "x"], name="embed")
    model = net.then("Relu").matmul(8, made).model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    (outputs,) = ort.run(model, [{"x": np.arange(6)[None]}])
    found = meanings(model, FirstSample(inputs={"x": (1, 6)}, outputs=outputs))[net.last]
    assert (found.task, found.axis) == (task, axis)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64])
def test_classes_that_the_graph_chose_are_labels_in_every_type(kind: int) -> None:
    found = row(segmenter().then("ArgMax", axis=1).then("Cast", to=kind), 0.1, kind=kind)
    assert found.task == "labels" and found.sqnr_db is None and set(found.dice) <= set(range(5)) and found.dice
    assert found.top1 is not None and 0.5 < found.top1 < 1
