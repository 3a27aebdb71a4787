"""How a diffusion model's sampler goes from noise to a picture: which steps, and what each does.

Share of the picture's variance that each training step keeps -> `Schedule` -> `Step` -> the next, less noisy, array.
One formula is DDIM (`eta` 0, no noise is added) and DDPM's ancestral sampler of fewer steps (`eta` 1). Must not run a
model.

Sources: Ho et al., arXiv 2006.11239; Song et al., arXiv 2010.02502, equations 12 and 16; Nichol and Dhariwal, arXiv
2102.09672.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qdq.core.errors import InputError

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """From training step `t` to the one that the sampler takes next.

    Attributes:
        t: the training step that the model is told.
        kept: the share of the picture's variance at `t`, in (0, 1).
        kept_next: at the next step, 1 behind the last.
        variance: of the noise that the sampler adds.
        clip: the pictures' largest magnitude, to which the predicted picture is held; None where it is not.
    """

    t: int
    kept: float
    kept_next: float
    variance: float
    clip: float | None = None

    @property
    def factor(self) -> float:
        """By how much an error of the predicted noise moves the next array, where nothing is clipped."""
        return math.sqrt(1 - self.kept_next - self.variance) - math.sqrt((1 - self.kept) * self.kept_next / self.kept)

    def next(self, x: Array, noise: Array, drawn: Array, *, excess: float = 0.0) -> Array:
        """The array of the next step.

        Args:
            x: of this step, any shape.
            noise: predicted, of the same shape.
            drawn: from a standard normal distribution, of the same shape.
            excess: variance of an error of `noise` that nothing foretells: as much less noise is added, for the error
                is noise already. Where it is more than the sampler adds, none is added.
        """
        picture = (x - math.sqrt(1 - self.kept) * noise) / math.sqrt(self.kept)
        added = self.variance - self.factor**2 * excess
        if self.clip is not None:
            picture = picture.clip(-self.clip, self.clip)
            noise = np.asarray((x - math.sqrt(self.kept) * picture) / math.sqrt(1 - self.kept), np.float32)
        onward = math.sqrt(self.kept_next) * picture + math.sqrt(1 - self.kept_next - self.variance) * noise
        return np.asarray(onward + math.sqrt(max(added, 0.0)) * drawn, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a sampler goes through.

    Attributes:
        kept: of each training step the share of the picture's variance that is left, falling, in (0, 1): what other
            libraries call alphas_cumprod.
        steps: training steps in the order of sampling, falling.
        eta: 0 for DDIM, 1 for DDPM.
        clip: see `Step`.
    """

    kept: Sequence[float]
    steps: Sequence[int]
    eta: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: shares that do not fall or are not in (0, 1), steps that are none of them or do not fall, an
                `eta` outside [0, 1], or a `clip` that is no magnitude.
        """
        kept = np.asarray(self.kept, np.float64)
        if kept.ndim != 1 or not kept.size or not (np.all(np.diff(kept) < 0) and kept[-1] > 0 and kept[0] < 1):
            raise InputError(
                f"The schedule's `kept` has shape {kept.shape} and is not a list of shares that fall, each above 0 and "
                "below 1: give the cumulative products of 1 - beta (alphas_cumprod)."
            )
        steps = np.asarray(self.steps)
        whole = steps.ndim == 1 and steps.size > 0 and steps.dtype.kind in "iu"
        if not whole or np.any(np.diff(steps) >= 0) or steps[0] >= kept.size or steps[-1] < 0:
            raise InputError(
                f"The schedule's steps are {list(self.steps)[:5]} ...: falling whole numbers from 0 to {kept.size - 1} "
                "are needed, the noisiest first."
            )
        if not 0 <= self.eta <= 1:
            raise InputError(f"The schedule's eta is {self.eta}: from 0 (DDIM) to 1 (DDPM) is needed.")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise InputError(
                f"The schedule's clip is {self.clip}: the pictures' largest magnitude, above 0, is needed, or None for "
                "pictures without one."
            )

    @classmethod
    def spaced(cls, kept: Sequence[float], count: int, *, eta: float = 1.0, clip: float | None = None) -> Schedule:
        """`count` steps at even distances, the last one training step 0.

        Raises:
            InputError: more steps than there are, or see the class.
        """
        if not isinstance(count, int) or not 0 < count <= len(kept):
            raise InputError(f"{count!r} steps are asked for: from 1 to the {len(kept)} of training are possible.")
        steps = [int(i) * (len(kept) // count) for i in reversed(range(count))]
        return cls(kept=kept, steps=steps, eta=eta, clip=clip)

    def __iter__(self) -> Iterator[Step]:
        """The steps in the order of sampling."""
        shares = [float(self.kept[t]) for t in self.steps]
        for t, now, after in zip(self.steps, shares, [*shares[1:], 1.0], strict=True):
            variance = self.eta**2 * (1 - after) / (1 - now) * (1 - now / after)
            yield Step(t=int(t), kept=now, kept_next=after, variance=variance, clip=self.clip)


def cosine(count: int = 1000) -> list[float]:
    """The shares that the cosine schedule keeps at each of `count` training steps.

    >>> [round(share, 3) for share in cosine(4)]
    [0.849, 0.498, 0.146, 0.0]

    Source: Nichol and Dhariwal, equation 17; no step takes more than .999 of what is left.

    Raises:
        InputError: fewer than one step.
    """
    if count < 1:
        raise InputError(f"{count} training steps are asked for: a schedule has at least one, and usually 1000.")
    curve = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return [float(share) for share in np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], 0.999))]
