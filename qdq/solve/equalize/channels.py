"""What equalization looks at: the channels of a data tensor, and of the weights that read it. Chooses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from qdq.core.arrays import Floats
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.measure import second_moments
from qdq.measure.inference.samples import Sample, counted
from qdq.measure.inference.session import Tap
from qdq.measure.statistics import ChannelRange, union
from qdq.model.model import Model
from qdq.model.nodes import attribute
from qdq.plan.plan import Plan, Point

ROWS = 8192  # channel vectors looked at per tensor, over all samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """One tensor whose channels are divided before it is quantized.

    Attributes:
        scale: (channels,) float32 divisors.
        params: quantization of the divided tensor.
        gain_db: predicted fall of the error at the consumers' outputs.
    """

    scale: npt.NDArray[np.float32]
    params: QParams
    gain_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """What samples show of one tensor's channels, as a `Statistic`.

    Attributes:
        limits: the exact range of each.
        parts: (vectors, channels) each, some of the channel vectors.
    """

    limits: ChannelRange
    parts: tuple[npt.NDArray[np.float32], ...]

    def merge(self, other: Channels) -> Channels:
        """What both show."""
        return Channels(limits=self.limits.merge(other.limits), parts=(*self.parts, *other.parts))

    @property
    def rows(self) -> Floats:
        """(vectors, channels), a new array: the same whatever the samples' order, so that sums over them are."""
        return np.concatenate(sorted(self.parts, key=np.ndarray.tobytes)).astype(np.float64)


def data_readers(model: Model, point: Point) -> list[NodeProto]:
    """The nodes that multiply an activation's channels by constant weights, if they are all that reads its codes.

    Every one is a Conv, or every one a Gemm or MatMul without transA; none for any other activation, or where it is
    tied to another.
    """
    nodes = [model.node(name) for name, _ in point.uses]
    plain = all(
        index == 0
        and not attribute(node, "transA", 0)
        and model.is_constant(node.input[1])
        and len(model.initializers[node.input[1]].dims) >= 2
        for node, (_, index) in zip(nodes, point.uses, strict=True)
    )
    return nodes if plain and point.tie is None and len({node.op_type == "Conv" for node in nodes}) == 1 else []


def candidates(model: Model, plan: Plan) -> dict[str, list[str]]:
    """Activation tensors that may be equalized -> the weights that read them.

    Every reader is an ungrouped Conv, or every one a Gemm or MatMul without transA; no weight is shared with another
    tensor; the tensor is no shortcut and is tied to no other.
    """
    reads: dict[str, set[str]] = {}
    for point in plan.weights:
        reads.setdefault(point.tensor, set()).update(model.node(name).input[0] for name, _ in point.uses)
    found = {}
    for point in plan.activations:
        nodes = data_readers(model, point)
        if nodes and all(attribute(n, "group", 1) == 1 and reads.get(n.input[1]) == {point.tensor} for n in nodes):
            found[point.tensor] = list(dict.fromkeys(n.input[1] for n in nodes))
    return found


def look(
    model: Model, points: Mapping[str, Point], samples: Iterable[Sample], on_progress: Progress | None
) -> dict[str, Channels]:
    """What samples show of some activation tensors.

    Args:
        model: the prepared float model.
        points: tensor -> its point.
        samples: re-iterable; at most `gram.MAX_SAMPLES` of them are run.
        on_progress: called with (samples done, samples in all or None, text).

    Returns:
        Tensor -> what they show of its channels.
    """
    if not points:
        return {}
    tap = Tap(model, list(points), threads=second_moments.THREADS)
    samples = second_moments.few(samples)
    each = max(1, ROWS // len(samples))
    convolved = {tensor: model.node(point.uses[0][0]).op_type == "Conv" for tensor, point in points.items()}

    def seen() -> Iterator[dict[str, Channels]]:
        for index, sample in counted(samples):
            yield {tensor: _one(values, convolved[tensor], each) for tensor, values in tap(sample).items()}
            if on_progress is not None:
                on_progress(index + 1, len(samples), "channel ranges")

    return union(seen())


def _one(values: npt.NDArray[np.floating], convolved: bool, each: int) -> Channels:
    """What one sample shows of a tensor, with `each` of its channel vectors."""
    grid = values.reshape(*values.shape[:2], -1) if convolved else values.reshape(-1, values.shape[-1], 1)
    positions = grid.shape[0] * grid.shape[2]
    picked = np.random.default_rng(positions).choice(positions, min(each, positions), replace=False)
    first, last = np.divmod(np.sort(picked), grid.shape[2])
    return Channels(limits=ChannelRange.of(grid, axis=1), parts=(grid[first, :, last].astype(np.float32),))
