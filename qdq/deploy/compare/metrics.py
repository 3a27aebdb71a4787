"""Task metrics: how well outputs do the job that a model is for, on top of how near they are to the float model's.

outputs of one sample + labels, or the float model's outputs where there are none -> `add` -> `value` over all samples.
A metric is a class that `registered` gives a name. Only sums are kept; rank correlation keeps the values it ranks.
Must not run models or read files.

Classes lie on the metric's `axis`. A label below 0 is left out.
Sources: Jelinek et al. 1977 (perplexity); Dice 1945; Spearman 1904, ties by mean rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import spearman
from qdq.core.errors import InputError

Array = npt.NDArray[Any]
MOST_EMBEDDINGS = 2048  # whose pairs are ranked: two million similarities


class Metric(Protocol):
    """What `compare` needs of a metric; one object scores one model."""

    higher_is_better: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_unit: ClassVar[bool] = False  # its value is in the unit of the output: made with `per`
    has_classes: ClassVar[bool] = False  # along `axis`
    of_volumes: ClassVar[bool] = False  # of whole images: see `volume_metrics`
    of_each: ClassVar[bool] = False  # output of several, where none is chosen; `relative` says which does worst
    masks: ClassVar[bool] = False  # labels are the tokens that `runs` masks: see `masked_metrics`
    usual_share: ClassVar[float | None] = None  # of tokens masked at once; None: one of a sequence
    one_at_a_time: ClassVar[bool] = False  # no other share will do
    from_unmasked: ClassVar[bool] = False  # the first run of a sample masks none
    axis: int = -1

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """Count one sample.

        Args:
            found: an output of the model that is scored.
            reference: the same output of the float model, of the same shape.
            labels: the truth; None takes the reference for it.

        Raises:
            InputError: the labels, or the output's rank, do not fit the metric.
        """

    @property
    def value(self) -> float:
        """Over everything added; NaN where nothing counts."""

    @property
    def relative(self) -> float:
        """The value without a unit, larger where it is worse; NaN where a metric has none."""
        return math.nan


M = TypeVar("M", bound=type[Metric])
_REGISTERED: dict[str, type[Any]] = {}
METRICS: Mapping[str, type[Any]] = MappingProxyType(_REGISTERED)


def registered(name: str) -> Callable[[M], M]:
    """Make a class a metric of that name."""

    def keep(found: M) -> M:
        _REGISTERED[name] = found
        return found

    return keep


def metric(name: str, *, per: float = 1.0, axis: int = -1) -> Metric:
    """A new metric, a key of `METRICS`.

    Args:
        name: of the metric.
        per: with a unit: how many of the output's units make one of those reported.
        axis: of the classes, for a metric that has them.
    """
    found: Metric = METRICS[name](per) if METRICS[name].has_unit else METRICS[name]()
    found.axis = axis
    return found


def next_tokens(tokens: Array) -> npt.NDArray[np.int64]:
    """The label of each position of a language model: the token after it; the last position has none (-1).

    >>> next_tokens(np.asarray([[5, 6, 7]])).tolist()
    [[6, 7, -1]]
    """
    return np.concatenate([tokens[..., 1:], np.full_like(tokens[..., :1], -1)], axis=-1).astype(np.int64)


class Mean(Metric):
    """A metric that is a mean over positions, rows or elements."""

    def __init__(self) -> None:
        """Nothing added."""
        self._sum, self._count = 0.0, 0

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        return self._sum / self._count if self._count else math.nan


@registered("perplexity")
class Perplexity(Mean):
    """exp of the mean of -log softmax(logits)[label]; probabilities are taken as such."""

    higher_is_better: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """See `Metric.add`."""
        rows = by_class(found, self.axis).astype(np.float64)
        truth = _labels(labels, rows.shape[:-1], "perplexity")
        if truth.size and int(truth.max()) >= rows.shape[-1]:
            raise InputError(
                f"A label is {int(truth.max())}, but the output has {rows.shape[-1]} classes, 0 to "
                f"{rows.shape[-1] - 1}. Give the labels in the classes of the model."
            )
        counted = truth >= 0
        with np.errstate(divide="ignore", invalid="ignore"):
            if _probabilities(by_class(reference, self.axis)):
                logs = np.log(rows)
            else:
                shifted = rows - rows.max(axis=-1, keepdims=True)
                logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(logs, np.maximum(truth, 0)[..., None], -1)[..., 0]
        self._sum -= float(chosen[counted].sum())
        self._count += int(counted.sum())

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        mean = super().value
        return math.exp(mean) if not mean > 700 else math.inf


@registered("top1")
class Top1(Mean):
    """Fraction of positions whose argmax is the label, or the argmax of the float model."""

    has_classes: ClassVar[bool] = True

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """See `Metric.add`."""
        best = by_class(found, self.axis).argmax(axis=-1)
        truth = (
            by_class(reference, self.axis).argmax(axis=-1) if labels is None else _labels(labels, best.shape, "top1")
        )
        self._sum += np.count_nonzero(best == truth)
        self._count += int(np.count_nonzero(truth >= 0))


@registered("dice")
class Dice(Metric):
    """Mean over classes of 2 |both| / (|found| + |true|), without class 0 where there are others.

    An output with one channel, labels of the output's own shape, or float outputs in [0, 1] whose channels do not sum
    to 1, are masks, one per channel: above 0.5 where the float model's values lie in [0, 1], else above 0. Any other
    has the class of its largest channel. The first sample decides.
    """

    has_classes: ClassVar[bool] = True

    def __init__(self) -> None:
        """Nothing added."""
        self._masks: bool | None = None
        self._threshold = 0.0
        self._counts = np.zeros((2, 0))

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """See `Metric.add`."""
        channels = by_class(reference, self.axis)
        classes = channels.shape[-1]
        if self._masks is None:
            within = bool(channels.min() >= 0 and channels.max() <= 1)
            apart = within and not _probabilities(channels)
            same = labels is not None and labels.shape == reference.shape
            self._masks = classes == 1 or apart or same
            self._threshold = 0.5 if within else 0.0
            self._counts = np.zeros((2, classes))
        ours = self._classes(by_class(found, self.axis))
        if labels is None:
            theirs = self._classes(channels)
        elif self._masks:
            theirs = by_class(_truth(reference, labels, "dice"), self.axis) > 0
        else:
            theirs = _one_hot(_labels(labels, channels.shape[:-1], "dice"), classes)
        others = tuple(range(ours.ndim - 1))
        self._counts += [2.0 * (ours & theirs).sum(others), ours.sum(others) + theirs.sum(others)]

    def _classes(self, channels: Array) -> npt.NDArray[np.bool_]:
        """(..., classes): where each class is."""
        if self._masks:
            return np.asarray(channels > self._threshold)
        return _one_hot(channels.argmax(axis=-1), channels.shape[-1])

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        both, either = self._counts if self._masks or self._counts.shape[1] < 2 else self._counts[:, 1:]
        seen = either > 0
        return float(np.mean(both[seen] / either[seen])) if seen.any() else math.nan


@registered("cosine")
class Cosine(Mean):
    """Mean over the leading axis of the cosine to the labels, or to the float model's output.

    1 where both are zero, 0 where one is.
    """

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """See `Metric.add`."""
        ours, theirs = _rows(found), _rows(_truth(reference, labels, "cosine"))
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        equal = (np.linalg.norm(ours, axis=1) == np.linalg.norm(theirs, axis=1)).astype(np.float64)
        safe = np.where(lengths == 0, 1.0, lengths)
        cosines = np.where(lengths == 0, equal, (ours * theirs).sum(axis=1) / safe)
        self._sum += float(cosines.sum())
        self._count += len(cosines)


@registered("spearman")
class Spearman(Metric):
    """Rank correlation with the labels, or with the float model's outputs.

    An item of the leading axis with one number is ranked by it. Longer ones are embeddings, and what is ranked is the
    cosine of two: with labels, of each two consecutive items (one label per pair, as in semantic textual similarity);
    without, of every pair of the first `MOST_EMBEDDINGS` items, against the same in the float model.
    """

    def __init__(self) -> None:
        """Nothing added."""
        self._found: list[Array] = []
        self._reference: list[Array] = []
        self._labels: list[Array] = []
        self._kept = 0

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """See `Metric.add`."""
        ours, theirs = (_rows(a[:, None] if a.ndim == 1 else a) for a in (found, reference))
        single = ours.shape[1] == 1
        if labels is not None:
            if labels.size != (len(ours) if single else len(ours) / 2):
                raise InputError(
                    f"A sample has {labels.size} labels and {len(ours)} outputs of {ours.shape[1]} numbers. Spearman "
                    "needs one label per number, or one per pair of embeddings: the two of a pair follow each other in "
                    "the batch of one sample."
                )
            self._labels.append(labels.reshape(-1).astype(np.float64))
            theirs = theirs[:0]
        elif not single:
            ours, theirs = (a[: MOST_EMBEDDINGS - self._kept] for a in (ours, theirs))
            self._kept += len(ours)
        self._found.append(ours if single or labels is None else _cosines(ours[0::2], ours[1::2])[:, None])
        self._reference.append(theirs)

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        if not self._found:
            return math.nan
        found = np.concatenate(self._found)
        if self._labels:
            return spearman(found[:, 0], np.concatenate(self._labels))
        reference = np.concatenate(self._reference)
        if found.shape[1] == 1:
            return spearman(found[:, 0], reference[:, 0])
        pairs = np.triu_indices(len(found), 1)
        ours, theirs = (_similarities(rows)[pairs] for rows in (found, reference))
        return spearman(ours, theirs)


@registered("mae")
class MeanAbsoluteError(Mean):
    """Mean |output - label|, or |output - float model's output|, divided by `per`.

    Relative, it is a part of the standard deviation of what it compares with; of the mean size where that is constant.
    """

    higher_is_better: ClassVar[bool] = False
    has_unit: ClassVar[bool] = True
    of_each: ClassVar[bool] = True

    def __init__(self, per: float = 1.0) -> None:
        """Nothing added; `per` as in `metric`."""
        super().__init__()
        self._per, self._origin = per, math.nan
        self._moments = np.zeros(3)  # of the truth: its size; and less the first mean, itself and its square

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """See `Metric.add`."""
        truth = _truth(reference, labels, "mae").astype(np.float64)
        if math.isnan(self._origin) and truth.size:
            self._origin = float(truth.mean())
        around = truth - self._origin
        self._moments += [np.abs(truth).sum(), around.sum(), (around * around).sum()]
        self._sum += float(np.abs(found.astype(np.float64) - truth).sum())
        self._count += found.size

    @property
    def relative(self) -> float:
        """See `Metric.relative`."""
        size, mean, square = self._moments / max(self._count, 1)
        scale = math.sqrt(max(square - mean * mean, 0.0)) or size
        error = super().value
        return error / scale if scale else math.inf if error else 0.0

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        return super().value / self._per


def by_class(output: Array, axis: int) -> Array:
    """The output with its classes on the last axis."""
    if output.ndim < 2 or not -output.ndim <= axis < output.ndim:
        raise InputError(
            f"The output has shape {list(output.shape)}, and this metric needs classes on axis {axis} of two or more. "
            "Choose another output, metric or --class-axis."
        )
    return np.moveaxis(output, axis, -1)


def _probabilities(channels: Array) -> bool:
    """Whether values on the last axis lie in [0, 1] and sum to 1."""
    if channels.shape[-1] < 2 or channels.min() < 0:
        return False
    return bool(np.abs(channels.astype(np.float64).sum(axis=-1) - 1).max() < 0.01)


def _unfit(name: str, needed: tuple[int, ...], got: tuple[int, ...]) -> InputError:
    return InputError(
        f"The labels of a sample have shape {list(got)}; {name} needs {list(needed)}, one for each position of the "
        "output. Save them so, with -1 for a position that does not count, or choose other labels."
    )


def _labels(labels: Array | None, shape: tuple[int, ...], name: str) -> npt.NDArray[np.int64]:
    """Class labels in the shape of an argmax; axes of length 1 do not matter."""
    if labels is None or labels.size != math.prod(shape):
        raise _unfit(name, shape, () if labels is None else labels.shape)
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise InputError(f"The labels of a sample are no whole numbers, and {name} needs classes. Check the labels.")
    return labels.reshape(shape).astype(np.int64)


def _truth(reference: Array, labels: Array | None, name: str) -> Array:
    """Labels in the shape of the output, or the float model's output."""
    if labels is None:
        return reference
    if labels.size != reference.size:
        raise _unfit(name, reference.shape, labels.shape)
    return labels.reshape(reference.shape)


def _one_hot(classes: Array, count: int) -> npt.NDArray[np.bool_]:
    return np.asarray(classes[..., None] == np.arange(count))


def _rows(output: Array) -> npt.NDArray[np.float64]:
    """One row per item of the leading axis; an output of rank 1 is one row."""
    return output.reshape(len(output) if output.ndim > 1 else 1, -1).astype(np.float64)


def _cosines(a: Array, b: Array) -> Array:
    """The cosine of each row of `a` with that of `b`; 0 where one is zero."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.where(lengths == 0, 1.0, lengths))


def _similarities(rows: Array) -> Array:
    """The cosines of every row with every row."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(lengths == 0, 1.0, lengths)
    return np.asarray(unit @ unit.T)
