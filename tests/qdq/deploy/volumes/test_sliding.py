"""A network over whole volumes: the mean over windows, part by part, whatever the memory."""

from __future__ import annotations

import tracemalloc
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qdq.build.keys.window import PADDINGS, Window
from qdq.core.errors import InputError
from qdq.deploy.volumes.decode import Classes
from qdq.deploy.volumes.sliding import Sliding, output

Array = npt.NDArray[Any]


def network(patches: Array) -> Array:
    """Two channels that depend on the place in the patch, as a network's do near borders."""
    place = np.linspace(-1, 1, patches.shape[3], dtype=np.float32)[:, None]
    return np.concatenate([patches[:, :1] * place, np.tanh(patches[:, :1]) + place**2], axis=1)


def volume(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


def plainly(given: Array, window: Window) -> Array:
    """The whole mean at once, in double precision."""
    sizes = window.sizes(given.shape[1:])
    short = [max(s - n, 0) for s, n in zip(sizes, given.shape[1:], strict=True)]
    mode: Any = PADDINGS[window.padding]
    more: Any = {"constant_values": window.pad_value} if mode == "constant" else {}
    padded = np.pad(given, [(0, 0), *((n // 2, n - n // 2) for n in short)], mode=mode, **more)
    weight = window.map(sizes).astype(np.float64)
    sums, total = np.zeros((2, *padded.shape[1:])), np.zeros(padded.shape[1:])
    for start in product(*(window.starts(n, s) for n, s in zip(padded.shape[1:], sizes, strict=True))):
        place = tuple(slice(b, b + s) for b, s in zip(start, sizes, strict=True))
        patch = padded[(slice(None), *place)][None]
        each = []
        for flip in product(*[[False, True]] * len(window.mirror)):
            turned = tuple(2 + a for a, on in zip(window.mirror, flip, strict=True) if on)
            each.append(np.flip(network(np.flip(patch, turned)), turned)[0])
        sums[(slice(None), *place)] += np.mean(each, axis=0) * weight
        total[place] += weight
    cut = tuple(slice(n // 2, n // 2 + m) for n, m in zip(short, given.shape[1:], strict=True))
    return np.asarray((sums / total)[(slice(None), *cut)])


@pytest.mark.parametrize("rule", ["monai", "nnunet"])
@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize(
    "more", ["overlap=0.5", "overlap=0.25:mirror=0,2", "batch=3", "padding=replicate", "pad_value=-3", "overlap=0"]
)
def test_it_is_the_weighted_mean_over_windows(rule: str, weights: str, more: str) -> None:
    given, window = volume((50, 37, 20)), Window.parse(f"32x24x32:rule={rule}:weights={weights}:{more}")
    assert np.abs(output(Sliding(run=network, window=window), given) - plainly(given, window)).max() < 1e-5


def test_slices_one_by_one() -> None:
    given, window = volume((5, 40, 30)), Window.parse("16x16:rule=nnunet:mirror=0,1")
    seen: list[tuple[int, ...]] = []

    def flat(patches: Array) -> Array:
        seen.append(patches.shape)
        return network(patches)

    found = output(Sliding(run=flat, window=window), given)
    assert set(seen) == {(1, 1, 1, 16, 16)} and np.isfinite(found).all()
    again = output(Sliding(run=network, window=window), given[:, 2:3])
    np.testing.assert_allclose(found[:, 2:3], again, atol=1e-6)


@pytest.mark.parametrize("shape", [(50, 37, 20), (20, 37, 50), (20, 50, 37)])
def test_less_memory_gives_the_same_bytes(shape: tuple[int, int, int]) -> None:
    given, window = volume(shape), Window.parse("16x16x16:overlap=0.5")
    whole = Sliding(run=network, window=window)
    expected = output(whole, given)
    strips = Sliding(run=network, window=window)
    np.testing.assert_array_equal(output(strips, given, room=40_000), expected)
    assert whole.repeated == 0 and strips.repeated > 0 and strips.runs == whole.runs + strips.repeated


def test_the_first_window_runs_once() -> None:
    calls = []
    sliding = Sliding(run=lambda p: calls.append(len(p)) or network(p), window=Window(patch=(0, 0, 0)))
    output(sliding, volume((8, 9, 10)))
    assert calls == [1] and sliding.runs == 1


def test_every_voxel_comes_once() -> None:
    given = volume((30, 21, 13))
    counted = np.zeros(given.shape[1:], int)
    for part in Sliding(run=network, window=Window(patch=(8, 8, 16))).parts(given, room=5_000):
        assert part.values.shape[1:] == counted[part.place].shape
        counted[part.place] += 1
    assert (counted == 1).all()


def test_one_slice_is_padded() -> None:
    found = output(Sliding(run=network, window=Window(patch=(8, 8, 8), rule="nnunet")), volume((20, 20, 1)))
    assert found.shape == (2, 20, 20, 1)


@pytest.mark.parametrize("strips", [1, 3])
def test_memory_is_one_slab(strips: int) -> None:
    """Volume, labels and one slab, or strip of it, also at seams: not the channels of the whole volume."""
    channels, shape = 30, (160, 40, 40)
    given, decoder = volume(shape), Classes(channels=30)

    def many(patches: Array) -> Array:
        return np.repeat(patches, channels, axis=1)

    slab = -(-4 * (channels + 1) * 16 * 40 * 40 // strips)
    whole, patch = 4 * channels * given.size, 4 * channels * 16**3
    labels = np.zeros(shape, decoder.dtype)
    tracemalloc.start()
    try:
        for part in Sliding(run=many, window=Window(patch=(16, 16, 16))).parts(given, room=slab + 2 * patch):
            labels[part.place] = decoder.labels(part.values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < slab + 3 * patch < whole / 2


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (lambda p: network(p)[..., ::2], "of the patch's own size is needed"),
        (lambda p: network(p) * np.float32(np.inf), "not finite, somewhere in voxels"),
        (lambda p: network(p)[:, :, 0], "of the patch's own size is needed"),
    ],
)
def test_what_a_network_must_give(spoiled: Any, said: str) -> None:
    for mirror in ((), (2,)):
        with pytest.raises(InputError, match=said):
            output(Sliding(run=spoiled, window=Window(patch=(8, 8, 8), mirror=mirror)), volume((9, 9, 9)))


def test_voxels_that_are_no_numbers_are_refused() -> None:
    given = volume((9, 9, 9))
    given[0, 1, 2, 3] = np.nan
    with pytest.raises(InputError, match="1 of 729 voxels are NaN or infinite"):
        output(Sliding(run=network, window=Window(patch=(8, 8, 8))), given)


def test_reflection_needs_an_axis_that_is_long_enough() -> None:
    with pytest.raises(InputError, match="An axis of 2 voxels cannot be reflected"):
        output(Sliding(run=network, window=Window(patch=(8, 8, 8), padding="reflect")), volume((2, 9, 9)))
