"""Every way that data can be wrong gives one paragraph that names the place, what was got, and the way out."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calib_data import DataError, InputSpec, open_samples, random_samples
from calib_data.validation import check_sample

IMAGE = InputSpec(name="image", dtype="float32", shape=("batch", 2, None))
IDS = InputSpec(name="ids", dtype="int32", shape=(1, 3))
HALF = InputSpec(name="image", dtype="float16", shape=(1, 2, None))
GOOD = np.ones((1, 2, 4), np.float32)


def refused(source: str | Path, *inputs: InputSpec, words: str) -> str:
    """The message of the DataError on opening or reading; every word pattern, split at " & ", must be in it."""
    with pytest.raises(DataError) as caught:
        list(open_samples(source, inputs or [IMAGE]))
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for word in words.split(" & "):
        assert re.search(word, message), f"{word!r} is not in: {message}"
    return message


@pytest.mark.parametrize(
    ("arrays", "inputs", "words"),
    [
        (
            {"imgae": GOOD},
            [IMAGE],
            "Wrong input names & no array for 'image' & Did you mean 'image' instead of 'imgae'",
        ),
        ({"image": GOOD}, [IMAGE, IDS], "no array for 'ids' & got 'image'"),
        ({"image": GOOD, "zebra": GOOD}, [IMAGE], "unknown 'zebra' & exactly 'image'"),
        ({}, [IMAGE], "got nothing"),
        ({"image": GOOD[0]}, [IMAGE], r"Wrong rank & \(2, 4\) of rank 2 & \(batch, 2, \?\) & batch axis missing"),
        ({"image": GOOD[None]}, [IMAGE], r"Wrong rank & rank 4 & array\[0\]"),
        ({"image": np.ones((1, 3, 4), np.float32)}, [IMAGE], "Wrong shape & axis 1 is 3 and must be 2"),
        ({"image": np.ones((1, 2, 0), np.float32)}, [IMAGE], "Empty array & Remove this sample"),
        ({"image": np.full((1, 2, 4), 255, np.uint8)}, [IMAGE], "Wrong dtype & got uint8 & float32 & Preprocess"),
        ({"image": GOOD > 0}, [IMAGE], "Wrong dtype & got bool"),
        ({"image": GOOD.astype("complex64")}, [IMAGE], "Wrong dtype & complex64"),
        ({"image": GOOD.astype("U4")}, [IMAGE], "Wrong dtype"),
        ({"ids": np.ones((1, 3), np.float32)}, [IDS], r"Wrong dtype & got float32 & astype\('int32'\)"),
        ({"ids": np.array([[0, 1, 1 << 40]])}, [IDS], "do not fit & from 0 to 1099511627776 & 2147483647"),
        ({"ids": np.array([[0, 1, 1 << 63]], np.uint64)}, [IDS], "do not fit"),
        ({"image": np.where(np.arange(8) == 5, np.nan, 1).reshape(1, 2, 4)}, [IMAGE], r"NaN & 1 of 8 & \(0, 1, 1\)"),
        ({"image": GOOD * np.inf}, [IMAGE], "NaN or infinite & 8 of 8"),
        ({"image": GOOD * 1e6}, [HALF], "exceed float16: normalize"),
        ({"image": GOOD * -1e6}, [HALF], "exceed float16: normalize"),
    ],
)
def test_wrong_sample(tmp_path: Path, arrays: dict[str, np.ndarray], inputs: list[InputSpec], words: str) -> None:
    np.savez(tmp_path / "subject7.npz", allow_pickle=False, **arrays)
    refused(tmp_path, *inputs, words=words + r" & subject7\.npz")


@pytest.mark.parametrize(
    ("array", "spec"),
    [
        (GOOD.astype("float64"), IMAGE),
        (GOOD.astype("float16"), IMAGE),
        (GOOD.astype(">f4"), IMAGE),
        (np.asfortranarray(np.ones((3, 2, 4), "f4")), IMAGE),
        (np.array([[1, 2, 3]], np.int64), IDS),
        (np.array([[1, 2, 3]], np.uint8), IDS),
        (np.array([[True, False, True]]), IDS),
    ],
)
def test_conversions_that_keep_the_meaning(tmp_path: Path, array: np.ndarray, spec: InputSpec) -> None:
    np.savez(tmp_path / "0.npz", allow_pickle=False, **{spec.name: array})
    (sample,) = open_samples(tmp_path, [spec])
    assert sample[spec.name].dtype == np.dtype(spec.dtype)
    assert sample[spec.name].flags.c_contiguous
    np.testing.assert_array_equal(sample[spec.name], array)


def test_arrays_may_be_empty_beside_others_or_where_the_model_says_so(tmp_path: Path) -> None:
    none = InputSpec(name="none", dtype="float32", shape=(2, 0))
    empty = {"image": GOOD[..., :0], "ids": np.ones((1, 3), np.int32), "none": np.zeros((2, 0), np.float32)}
    np.savez(tmp_path / "0.npz", **empty)
    samples = open_samples(tmp_path, [IMAGE, IDS, none])
    assert {name: array.shape for name, array in next(iter(samples)).items()} == {k: v.shape for k, v in empty.items()}
    assert samples.shapes()["image"].opt == (1, 2, 0)
    (tmp_path / "alone").mkdir()
    np.savez(tmp_path / "alone" / "0.npz", none=empty["none"])
    assert len(list(open_samples(tmp_path / "alone", [none]))) == 1


def test_where_in_a_stacked_file(tmp_path: Path) -> None:
    stack = np.ones((4, 1, 2, 4), np.float32)
    stack[2, 0, 0, 0] = np.nan
    np.savez(tmp_path / "all.npz", image=stack)
    refused(tmp_path / "all.npz", words="all.npz, sample 2 & NaN")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": GOOD[0], "ids": np.ones((1, 3), int)}, "Wrong rank & rank 2 & rank 4 & numpy.stack"),
        ({"image": GOOD, "ids": np.ones((2, 3), int)}, r"disagree & 'image': 1, 'ids': 2"),
        ({"image": GOOD[:0], "ids": np.ones((0, 3), int)}, "No samples & size 0"),
        ({"image": GOOD}, "no array for 'ids'"),
    ],
)
def test_wrong_stacked_file(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "all.npz", allow_pickle=False, **arrays)
    refused(tmp_path / "all.npz", IMAGE, IDS, words=words + r" & all\.npz")


def test_stacked_file_that_does_not_part_into_the_models_batches(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.ones((5, 2, 4), np.float32))
    spec = InputSpec(name="image", dtype="float32", shape=(2, 2, 4))
    refused(tmp_path / "all.npy", spec, words="Cannot split & 5 elements & 2 at a time")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", words="No such file or folder & nowhere & module.py:function")
    refused(tmp_path / "nowhere.npz", words="No such file or folder & nowhere.npz")
    refused(tmp_path, words="No samples in the folder & nothing & numpy.savez")
    (tmp_path / "doe.ima").write_bytes(b"")
    assert "doe" not in (said := refused(tmp_path, words="1 file, .ima")) and str(tmp_path) not in said
    refused(tmp_path / "doe.ima", words="Cannot read & doe.ima & convert")


def test_unclear_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", GOOD)
    refused(tmp_path, IMAGE, IDS, words="Cannot tell which input & 2 inputs & 'ids' & npz")
    np.savez(tmp_path / "1.npz", image=GOOD)
    refused(tmp_path, words="Cannot tell which files & 1 .npz and 1 .npy")


def truncated(path: Path) -> None:
    """Cut the last third off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def flipped(path: Path) -> None:
    """Change one byte of the values, which only a checksum can tell."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\x80\x3f" * 4)] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    """No bytes at all."""
    path.write_bytes(b"")


def replaced(path: Path) -> None:
    """Something else under the name."""
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 20)


@pytest.mark.parametrize("damage", [truncated, emptied, replaced])
@pytest.mark.parametrize("in_folder", [True, False])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_damaged_file(tmp_path: Path, damage: Callable[[Path], None], in_folder: bool, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    array = np.ones((1, 2, 4000), np.float32)
    if suffix == ".npz":
        np.savez(path, image=array)
    else:
        np.save(path, array)
    damage(path)
    refused(tmp_path if in_folder else path, words=f"Cannot read & broken{suffix} & again")


def test_truncated_file_says_by_how_much(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", GOOD)
    (tmp_path / "all.npy").write_bytes((tmp_path / "all.npy").read_bytes()[:-5])
    refused(tmp_path / "all.npy", words="all.npy & ends 5 bytes early")


def test_header_that_claims_terabytes(tmp_path: Path) -> None:
    with (tmp_path / "all.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1, 1, 2, 10**12)}
        np.lib.format.write_array_header_1_0(file, header)
    refused(tmp_path / "all.npy", words="Cannot read & all.npy & ends 8000000000000 bytes early")


def test_changed_values_fail_the_checksum(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", image=np.ones((3, 1, 2, 4), np.float32))
    flipped(tmp_path / "all.npz")
    refused(tmp_path / "all.npz", words="Cannot read & CRC")


def test_zip_member_that_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        archive.writestr("image.npy", b"hello")
    refused(tmp_path, words=r"Cannot read & 0\.npz & member image\.npy")


class Bomb:
    """Fails the test when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        """Make unpickling call pytest.fail."""
        return pytest.fail, ("the file was unpickled",)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "0.npz", image=objects)
    refused(tmp_path, words=r"Refused to unpickle & 0\.npz & object & float32")
    np.save(tmp_path / "all.npy", objects)
    refused(tmp_path / "all.npy", words=r"Refused to unpickle & all\.npy")
    (tmp_path / "all.npy").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "all.npy", words=r"Cannot read & all\.npy")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def samples(): return []", "No samples & yielded none & anew at each call"),
        ("def samples(): return 3", "is a int & iterable of dicts"),
        ("def samples(): yield np.ones(3)", "Wrong rank & sample 0"),
        ("def samples(): yield {'image': [[1.0], [1.0, 2.0]]}", "sample 0 is not an array"),
        ("def samples(): yield {'image': np.ones((1, 2, 4))}; yield {'imag': 1}", "sample 1 & Did you mean 'image'"),
        ("def sample(): yield 1", "No function 'samples' & it has sample;"),
        ("def samples(:", "Cannot import & SyntaxError"),
        ("import not_a_module_of_anyone\ndef samples(): return []", "Cannot import & not_a_module_of_anyone"),
    ],
)
def test_wrong_function(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "source.py").write_text(f"import numpy as np\n{body}\n")
    refused(f"{tmp_path / 'source.py'}:samples", words=words + r" & source\.py")


def test_function_file_missing_or_generator_used_up(tmp_path: Path) -> None:
    refused(f"{tmp_path / 'absent.py'}:samples", words="No such file & absent.py")
    body = "import numpy as np\nONCE = iter([{'image': np.ones((1, 2, 4))}])\ndef samples(): return ONCE"
    (tmp_path / "source.py").write_text(body)
    samples = open_samples(f"{tmp_path / 'source.py'}:samples", [IMAGE])
    with pytest.raises(DataError, match="used up"):  # by the look at its first sample
        list(samples)
    with pytest.raises(DataError, match="used up"):
        samples.shapes()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def samples():\n    raise KeyError('mine')", "KeyError & mine & line 2"),
        ("def samples():\n    yield {'image': 1.0}\n    raise KeyError('mine')", "KeyError & line 3"),
        ("import sys\ndef samples():\n    sys.exit(7)", "SystemExit: 7 & line 3"),
        ("raise SystemExit", "Cannot import & SystemExit & line 1"),
        ("def samples():\n    raise GeneratorExit", "GeneratorExit & line 2"),
        ("class E(Exception):\n    def __str__(self): raise E\ndef samples():\n    raise E", "no text & line 4"),
        (
            "class A:\n    def __array__(self, *a, **k): raise SystemExit(3)\ndef samples():\n    yield {'image': A()}",
            "is not an array: SystemExit: 3",
        ),
    ],
)
def test_what_the_users_code_raises_is_said_with_its_line(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "source.py").write_text(body)
    scalar = InputSpec(name="image", dtype="float64", shape=())
    refused(f"{tmp_path / 'source.py'}:samples", scalar, words=words)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.npy")  # who opens it waits for a writer for ever
    refused(tmp_path, words="no file & 0.npy")
    (tmp_path / "0.npy").unlink()
    (tmp_path / "0.npy").symlink_to("/dev/zero")
    refused(tmp_path, words="no file & 0.npy")


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_of_every_kind_of_compression(tmp_path: Path, kind: int) -> None:
    file = tmp_path / "0.npz"
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr("image.npy", stored(GOOD))
    data = bytearray(file.read_bytes())
    data[45:70] = bytes(25)  # behind the header of the member
    file.write_bytes(data)
    refused(tmp_path, words="Cannot read & 0.npz")


def test_a_member_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("image.npy", stored(GOOD))
        archive.writestr("image.npy", stored(GOOD))
    refused(tmp_path, words="'image' more than once")


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -1), }", "{'descr': " + "'" * 3]
)
def test_headers_that_are_no_header(tmp_path: Path, header: str) -> None:
    text = header.ljust(117) + "\n"
    (tmp_path / "0.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(8))
    refused(tmp_path, words="Cannot read & 0.npy")


def stored(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def test_shapes_are_checked_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", image=np.ones((4, 1, 3, 4), np.float32))
    with pytest.raises(DataError, match="axis 1 is 3"):
        open_samples(tmp_path / "all.npz", [IMAGE]).shapes()


@pytest.mark.parametrize("dtype", ["object", "str", "bfloat17", "complex64"])
def test_input_dtype_that_no_sample_can_have(dtype: str) -> None:
    with pytest.raises(DataError, match=f"the model takes {dtype}"):
        InputSpec(name="text", dtype=dtype, shape=(1,))


def test_bad_arguments(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", GOOD)
    with pytest.raises(DataError, match="no inputs"):
        open_samples(tmp_path, [])
    with pytest.raises(DataError, match="0 samples"):
        open_samples(tmp_path, [IMAGE], limit=0)
    with pytest.raises(DataError, match="0 random samples"):
        random_samples([IMAGE], 0, seed=0)
    with pytest.raises(DataError, match=r"axis 2 \(unnamed\).*--shape image"):
        random_samples([IMAGE], 1, seed=0)
    large, none = (InputSpec(name="x", dtype="float32", shape=shape) for shape in ((1 << 40, 4), (2, 0)))
    with pytest.raises(DataError, match=r"shape \(1099511627776, 4\) has more than 4294967296 elements"):
        random_samples([large], 1, seed=0)
    assert next(iter(random_samples([none], 1, seed=0)))["x"].shape == (2, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_mask_may_hold_minus_infinity(dtype: str) -> None:
    low = np.where(np.arange(8) == 5, -np.inf, 0).reshape(1, 2, 4)
    spec = InputSpec(name="image", dtype=dtype, shape=(1, 2, 4))
    assert np.array_equal(check_sample({"image": low}, [spec], "here")["image"], low)


def test_an_archive_is_opened_once_however_many_members_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        for index in range(300):
            archive.writestr(f"{index}.npy", stored(GOOD))
    opened, plain = [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *given: opened.append(given) or plain(*given))
    refused(tmp_path, words="no array for 'image' & unknown '0' & and 292 more")
    assert len(opened) == 1


def test_names_of_many_inputs_are_not_compared_with_each_other() -> None:
    class Name(str):
        """Counts how often it is compared; no two objects are one."""

        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)  # type: ignore[arg-type]

    count = 300
    fed = {Name(f"x{i}"): GOOD for i in range(count)}
    inputs = [InputSpec(name=Name(f"x{i}"), dtype="float32", shape=(1, 2, 4)) for i in range(count)]
    assert len(check_sample(fed, inputs, "a sample")) == count
    assert Name.compared < 10 * count
