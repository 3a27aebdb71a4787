"""Metrics of masked language models, of proteins as of text: labels are the tokens that were masked.

Runs that `runs` makes of a sample -> `add` -> `value`. Found by importing this; must not run models.

Sources: Devlin et al. 2019 (15 % masked at once); Salazar et al. 2020 (pseudo-perplexity, one at a time); Zhang et al.
2024 (categorical Jacobian: contacts from what a mutation does to the logits; here the mutation is to the mask token
alone); Dunn et al. 2008 (average product correction).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import Array, Mean, Perplexity, Top1, by_class, registered

NEAREST = 6  # positions apart: what is nearer is no contact but the chain itself
USUAL_SHARE = 0.15  # of tokens that are masked at once, as in training


@registered("masked-accuracy")
class MaskedAccuracy(Top1):
    """Fraction of masked tokens that the largest logit names."""

    masks: ClassVar[bool] = True
    usual_share: ClassVar[float | None] = USUAL_SHARE


@registered("pseudo-perplexity")
class PseudoPerplexity(Perplexity):
    """exp of the mean of -log softmax(logits)[token] over masked tokens."""

    masks: ClassVar[bool] = True


@registered("contacts")
class Contacts(Mean):
    """Mean over sequences of the correlation (Pearson) of the contact map with the float model's.

    The map of a sequence: how far (L2 over classes, their mean taken out) masking position i moves the logits of
    position j, symmetric by the mean with its transpose, less the average product; at positions 6 or more apart.
    """

    masks: ClassVar[bool] = True
    from_unmasked: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True

    def __init__(self) -> None:
        """Nothing added."""
        super().__init__()
        self._base: tuple[Array, Array] | None = None
        self._moved: dict[int, list[tuple[int, Array, Array]]] = {}  # row -> position, how far others moved, twice

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """Count one run: the unmasked sequences first, then copies with one token masked in each."""
        ours, theirs = (_sequences(by_class(output, self.axis)) for output in (found, reference))
        if labels is None or labels.size != ours[..., 0].size:
            raise InputError("The metric contacts needs logits for every token: choose another --score-output.")
        masked = labels.reshape(ours.shape[:2]) >= 0
        if self._base is None or not masked.any():
            self._finish()
            self._base = (ours, theirs)
            return
        ours, theirs = _lengths(ours - self._base[0]), _lengths(theirs - self._base[1])
        for row, at in np.argwhere(masked):
            self._moved.setdefault(int(row), []).append((int(at), ours[row], theirs[row]))

    def _finish(self) -> None:
        """Count the sequences of the sample that is complete."""
        for moved in self._moved.values():
            places = np.asarray([at for at, _, _ in moved])
            far = np.abs(places[:, None] - places) >= NEAREST
            if far.any():
                ours, theirs = (_contact_map(np.stack([each[k] for each in moved])[:, places]) for k in (1, 2))
                if np.ptp(theirs[far]):  # else the float model has no contacts to tell
                    same = np.corrcoef(ours[far], theirs[far])[0, 1] if np.ptp(ours[far]) else 0.0
                    self._sum += float(same)
                    self._count += 1
        self._moved, self._base = {}, None

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        self._finish()
        return super().value


def _sequences(classes: Array) -> npt.NDArray[np.float64]:
    """(rows, positions, classes)."""
    return classes.reshape(-1, *classes.shape[-2:]).astype(np.float64)


def _lengths(moved: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """(rows, positions): how far logits moved, whatever was added to all of them."""
    return np.asarray(np.linalg.norm(moved - moved.mean(axis=-1, keepdims=True), axis=-1))


def _contact_map(moved: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(positions, positions), symmetric, less the average product."""
    both = (moved + moved.T) / 2
    np.fill_diagonal(both, 0)
    mean = both.mean()
    return np.asarray(both - np.outer(both.mean(axis=0), both.mean(axis=1)) / (mean if mean else 1.0))
