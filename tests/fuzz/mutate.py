"""Inputs that are almost right: a valid file with one to three hostile changes, made where its form is known.

kind of file + Random -> `files` writes a folder -> the command line that reads it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from fuzz.mutate_model import INTEGERS, flipped, model, network
from models import save_samples

from engines.core.documents import replace
from engines.verify.manifest import Manifest

# ---- JSON and YAML

PLAIN: list[Any] = [None, True, 1e308, -1e308, 0, -1, 0.5, 1 << 70, [], {}, [[]], {"a": 1}]
PLAIN += ["", "nan", "x" * 3000, "a\0b", "\ud800"]


def document(text: str, random: Random) -> str:
    """A JSON file."""
    if random.random() < 0.1:
        return flipped(text.encode(), random).decode(errors="replace")
    if random.random() < 0.05:
        return random.choice(["[" * 100_000, '{"a":' * 50_000, "1" * 100_000, "[1e999999]", "", "\0", '"\ud800"'])
    content = json.loads(text)
    for _ in range(random.choice([1, 1, 2, 4])):
        _plain(content, random)
    return json.dumps(content)


def _plain(content: Any, random: Random) -> None:
    """Change one value somewhere inside."""
    place = content
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = random.choice(keys)
        inside = place[key]
        if not (isinstance(inside, dict | list) and inside) or random.random() < 0.2:
            what = random.randrange(5)
            if what == 0:
                del place[key]
            elif what == 1 and isinstance(inside, int | float) and not isinstance(inside, bool):
                place[key] = random.choice([-inside, inside + 1, inside * 1e300, inside / 3, *INTEGERS])
            elif what == 2 and isinstance(place, dict):
                place[random.choice(["schema", "format", "extra", "name", ""])] = copy.deepcopy(inside)
            elif what == 3 and isinstance(place, list):
                place.append(copy.deepcopy(inside))
            else:
                place[key] = copy.deepcopy(random.choice(PLAIN))
            return
        place = inside


RECIPE = {
    "scheme": "int8",
    "calibrator": "entropy",
    "exclude": ["*conv*"],
    "target": ["sm86"],
    "shape": ["x:1x8:2x8:4x8"],
    "min_sqnr_db": 20,
    "gpu": ["a10"],
    "tune": "off",
    "percentile": 99.9,
    "block": 64,
    "time_limit": 3,
}
YAML = [
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nscheme: [*b,*b,*b,*b,*b]",
    "min_sqnr_db: 2024-13-45",
    "scheme: " + "[" * 3000,
    "? [a, b]\n: c",
    "{a: 1}: 2",
    "scheme: !!python/object/apply:os.system [ls]",
    "scheme: !!binary x",
    "<<: {scheme: int8}",
    "min_sqnr_db: 0x" + "f" * 5000,
    "min_sqnr_db: " + "9" * 5000,
    "shape: x:" + "9" * 5000,
    "--- a\n--- b",
    "time_limit: .inf",
    "exclude: ['[', '*', '']",
    "tune: 1:2:3",
]


def recipe(random: Random) -> str:
    """A YAML file."""
    if random.random() < 0.3:
        return random.choice(YAML)
    content = {key: value for key, value in RECIPE.items() if random.random() < 0.6}
    text = json.dumps(content)  # YAML too
    return document(text, random) if content else ""


# ---- samples


def sample(random: Random) -> tuple[str, bytes]:
    """A .npy or .npz file: its suffix and content."""
    data = io.BytesIO()
    shape = random.choice([(1, 8), (2, 8), (8,), (0, 8), (1, 9), (), (1, 8, 1)])
    dtype = random.choice(
        ["<f4", "<f4", "<f4", "<f8", ">f4", "<f2", "<i8", "|b1", "<c8", "<U3", "|S2", "<M8[s]", "|V4"]
    )
    np.save(data, np.zeros(shape, dtype), allow_pickle=False)
    content = data.getvalue()
    if random.random() < 0.5:
        header = random.choice(
            [
                "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -8), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }",
                "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 8), }",
                "{'descr': '|O', 'fortran_order': False, 'shape': (1, 8), }",
                "{'descr': [('a', '<f4'), ('b', '<i8')], 'fortran_order': False, 'shape': (1,), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 8",
                "{'descr': '''",
                "(" * 500,
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1.5, 8), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8), }",
                "__import__('os')",
            ]
        )
        text = header.ljust(1013) + "\n"
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(32)
    if random.random() < 0.3:
        content = flipped(content, random)
    if random.random() < 0.4:
        return ".npy", content
    archive = io.BytesIO()
    kind = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(archive, "w", kind) as opened:
        for name in random.choice([["x.npy"], ["x.npy", "y.npy"], ["y.npy"], [], ["../x.npy"], ["x"], ["x.npy/"]]):
            opened.writestr(name, content)
    packed = archive.getvalue()
    return ".npz", flipped(packed, random) if random.random() < 0.3 else packed


# ---- whole folders

Made = dict[str, bytes]  # what valid runs wrote
QUANTIZE = ["quantize", "model.onnx", "--data", "samples", "-o", "q.onnx", "--bias-correction", "off"]


ENGINE = ("m.engine", "m.engine.json", "m.engine.manifest.json", "q.onnx")
NEEDED = {
    "plan": ("plan.json",),
    "table": ("plan.json", "table.json"),
    "m.engine": ENGINE,
    "m.engine.manifest": ENGINE,
}


def valid(folder: Path, samples: int = 2) -> None:
    """A model and samples that fit."""
    onnx.save(network(), folder / "model.onnx")
    rng = np.random.default_rng(0)
    save_samples(folder / "samples", [{"x": rng.normal(size=(1, 8)).astype(np.float32)} for _ in range(samples)])


def _piped(path: Path, random: Random) -> None:
    """Once in a hundred times, put a pipe that nobody writes to in the place of a file."""
    if random.random() < 0.01:
        path.unlink()
        os.mkfifo(path)


def files(kind: str, folder: Path, made: Made, random: Random) -> list[str]:
    """Write the files of one run, one of them hostile; the command line."""
    valid(folder)
    if kind == "model":
        (folder / "model.onnx").write_bytes(model(random))
        _piped(folder / "model.onnx", random)
        verbs = [
            ["quantize", "model.onnx", "--random-data", "2", "-o", "q.onnx"],
            ["quantize", "model.onnx", "--random-data", "2", "-o", "q.onnx", "--scheme", "int4", "--rest", "fp16"],
            ["plan", "model.onnx", "-o", "p.json"],
            ["lint", "model.onnx"],
            ["explain", "model.onnx", "conv"],
        ]
        return random.choice(verbs)
    if kind == "samples":
        suffix, content = sample(random)
        for old in (folder / "samples").iterdir():
            old.unlink()
        (folder / "samples" / f"0{suffix}").write_bytes(content)
        return random.choice([QUANTIZE, [*QUANTIZE[:3], f"samples/0{suffix}", *QUANTIZE[4:]]])
    if kind == "recipe":
        (folder / "recipe.yaml").write_text(recipe(random), encoding="utf-8", errors="replace")
        _piped(folder / "recipe.yaml", random)
        return ["plan", "model.onnx", "--recipe", "recipe.yaml", "-o", "p.json"]
    for name in NEEDED[kind]:
        (folder / name).write_bytes(made[name])
    hostile = document(made[f"{kind}.json"].decode(), random)
    if kind == "m.engine.manifest" and random.random() < 0.8:  # else its checksum refuses it before more is read
        with suppress(ValueError, RecursionError):
            hostile = Manifest.from_mapping(json.loads(hostile)).to_json()
    (folder / f"{kind}.json").write_text(hostile, encoding="utf-8", errors="replace")
    if kind == "m.engine":  # else the manifest's hash refuses it before it is read
        manifest = Manifest.from_json(made["m.engine.manifest.json"])
        layers = hashlib.sha256((folder / "m.engine.json").read_bytes()).hexdigest()
        (folder / "m.engine.manifest.json").write_text(replace(manifest, layers=layers).to_json())
    _piped(folder / f"{kind}.json", random)
    return {
        "plan": [*QUANTIZE, "--plan", "plan.json"],
        "table": [*QUANTIZE, "--plan", "plan.json", "--table", "table.json"],
        "m.engine": ["audit", "m.engine"],
        "m.engine.manifest": ["audit", "m.engine"],
    }[kind]


KINDS = ("model", "model", "model", "samples", "recipe", "plan", "table", "m.engine", "m.engine.manifest")
