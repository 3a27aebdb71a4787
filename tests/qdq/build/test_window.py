"""The window's steps and weights are those of MONAI 1.6.1 and nnU-Net 2.8.1."""

from __future__ import annotations

import numpy as np
import pytest

from qdq.build.keys.window import Window
from qdq.core.errors import InputError


@pytest.mark.parametrize(
    ("rule", "overlap", "length", "size", "expected"),
    [
        ("monai", 0.5, 110, 64, [0, 32, 46]),
        ("monai", 0.25, 110, 64, [0, 46]),
        ("monai", 0.5, 200, 96, [0, 48, 96, 104]),
        ("monai", 0.5, 192, 96, [0, 48, 96]),
        ("monai", 0.0, 96, 96, [0]),
        ("nnunet", 0.5, 110, 64, [0, 23, 46]),
        ("nnunet", 0.5, 97, 96, [0, 1]),
        ("nnunet", 0.5, 200, 96, [0, 35, 69, 104]),
        ("nnunet", 0.5, 512, 128, [0, 64, 128, 192, 256, 320, 384]),
    ],
)
def test_steps(rule: str, overlap: float, length: int, size: int, expected: list[int]) -> None:
    window = Window.parse(f"{size}x{size}x{size}:rule={rule}:overlap={overlap}")
    assert window.starts(length, size) == expected


def test_gaussian_of_monai() -> None:
    found = Window(patch=(96,) * 3).map((96,) * 3)
    assert found.max() == pytest.approx(0.99740, abs=1e-5) and np.count_nonzero(found == found.max()) == 8
    assert found.min() == np.float32(1e-3) and np.mean(found == found.min()) == pytest.approx(0.58, abs=0.01)
    odd = Window(patch=(33,) * 3).map((33,) * 3)
    assert odd.max() == 1 and np.count_nonzero(odd == 1) == 1


def test_gaussian_of_nnunet() -> None:
    found = Window(patch=(96,) * 3, rule="nnunet").map((96,) * 3)
    assert found[48, 48, 48] == found.max() == 10
    assert found[0, 48, 48] == np.float16(3.3546e-3)
    assert found.min() == pytest.approx(5.96e-8, rel=1e-3) and np.mean(found == found.min()) < 0.02
    assert found[0, 0, 0] != found[-1, -1, -1] or found.min() == found[0, 0, 0]
    assert found[1, 48, 48] == found[95, 48, 48] and found[0, 48, 48] < found[95, 48, 48]


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("rule", ["monai", "nnunet"])
def test_no_weight_is_zero(rule: str, weights: str) -> None:
    window = Window.parse(f"8x1x4:rule={rule}:weights={weights}:sigma=0.02")
    assert window.map((8, 1, 4)).min() > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("96x96", None),
        ("96", "needs 3 numbers"),
        ("a x b", "Cannot read the window"),
        ("8x8x8:overlap=1", "overlap"),
        ("8x8x8:overlap=much", "Cannot read the window"),
        ("8x8x8:overlp=0.5", "Did you mean 'overlap'"),
        ("8x8x8:rule=medpy", "monai or nnunet"),
        ("8x8x8:mirror=0,0", "each axis of the patch once"),
        ("8x8:mirror=2", "each axis of the patch once"),
        ("8x8x8:pad_value=nan", "pad_value"),
        ("-8x8x8", "patch"),
    ],
)
def test_what_is_possible(text: str, said: str | None) -> None:
    if said is None:
        assert Window.parse(text).sizes((5, 200, 0)) == (1, 96, 96)
        return
    with pytest.raises(InputError, match=said):
        Window.parse(text)


def test_zero_is_the_whole_axis() -> None:
    assert Window(patch=(0, 32, 0)).sizes((7, 64, 9)) == (7, 32, 9)
