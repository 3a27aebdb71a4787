"""AntiBERTy by every scheme that the literature compares, as masked language models of proteins are judged.

    python tools/bench_proteins.py FOLDER [ROW ...] [--python PYTHON] [--calibrate N] [--score N] [--contacts N]

tools/export/antiberty.py writes FOLDER/antiberty.onnx and FOLDER/samples in an environment with torch (--python): the
first N chains calibrate, others are scored on. A row that FOLDER has is not made again; all that are there are printed.

Masked accuracy and pseudo-perplexity are over every residue of the chains that are scored on, 15 % of a chain masked at
once; SQNR is that of the logits on the same runs; cosine that of the embeddings of unmasked chains; contacts the
correlation of the map of `qdq compare --metric contacts`, on the first few chains. "naive" rows have one range a tensor
of the largest magnitude, weights rounded to nearest, and nothing else; "piecewise" and "one scale a token" are those
rows with the forms of tools/bench_piecewise.py. Times are predicted, at the usual length of the samples; those of
TensorRT on an A10 are derived, which is done for float and INT8 alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_piecewise import Writer, rows_of
from results import record

from calib_data import Samples, open_samples
from engines.backends.compiler import ShapeRange
from engines.core import arithmetic, onnx_runtime as ort
from engines.cost.predict import predict
from engines.verify.audit import audit
from qdq.assemble.precision.convert import convert
from qdq.assemble.tables import Tables
from qdq.build.engine import shape_ranges
from qdq.build.kept import kept_engine
from qdq.build.pricing.pricer import gpus_of
from qdq.build.pricing.tensorrt_pricer import pricer_of
from qdq.build.recipe import Recipe
from qdq.deploy.compare.compare import entries
from qdq.deploy.compare.metrics import metric
from qdq.deploy.compare.runs import runs
from qdq.deploy.compare.task import Masking, Task
from qdq.deploy.steps.shipped import written
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import weighted_nodes

NAIVE = "calibrator=max:rounding=nearest:equalize=none:bias_correction=off:shift=false"
SCHEMES: Mapping[str, str] = {  # what the literature calls it -> scheme
    "uniform, a scale a tensor": f"int8:block=tensor:{NAIVE}",
    "a scale a channel of weights": f"int8:{NAIVE}",
    "SmoothQuant": "int8-smooth:calibrator=max:rounding=nearest:bias_correction=off:shift=false",
    "INT8": "int8",
    "W4A8": "w4a8",
    "FPTQ": "fptq",
    "INT4": "int4",
    "INT4, blocks of 32": "int4:block=32",
}
FORMS: Mapping[str, str] = {"a scale a token": "token", "piecewise": "piecewise"}  # row -> of bench_piecewise
FLOATS: Mapping[str, str] = {"FP32": "fp32", "FP16": "fp16"}
ROWS = (*FLOATS, *list(SCHEMES)[:3], *FORMS, *list(SCHEMES)[3:])
MASKING = Masking(token=4, special=(0, 2, 3))
MEASURES = ("masked-accuracy", "pseudo-perplexity")
LOGITS, EMBEDDINGS = "logits", "last_hidden_state"


@dataclass(kw_only=True)
class Bench:
    """What all rows have in common."""

    model: Model
    calibration: Samples
    evaluation: list[dict[str, np.ndarray]]
    contacts: int
    shapes: Mapping[str, ShapeRange]
    tables: Tables
    reference: Any
    known: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # what the reference gave

    def score(self, session: Any) -> dict[str, float]:
        """The figures of a model's outputs."""
        counting = {name: metric(name) for name in MEASURES}
        power = noise = 0.0
        for found, expected, labels in self._runs("masked-accuracy", session, len(self.evaluation)):
            for each in counting.values():
                each.add(found, expected, labels)
            power += float(np.square(expected, dtype=np.float64).sum())
            noise += float(np.square(found - expected, dtype=np.float64).sum())
        contacts, cosine = metric("contacts"), metric("cosine")
        for found, expected, labels in self._runs("contacts", session, self.contacts):
            contacts.add(found, expected, labels)
        for number, sample in enumerate(self.evaluation):
            pair = next(ort.run(session, [sample]))[EMBEDDINGS], self._expected(EMBEDDINGS, number, sample, EMBEDDINGS)
            cosine.add(*(each.reshape(-1, each.shape[-1]) for each in pair), None)
        sqnr = float(10 * np.log10(power / noise)) if noise else float("inf")
        figures = {name: each.value for name, each in counting.items()}
        return {**figures, "sqnr_db": sqnr, "cosine": cosine.value, "contacts": contacts.value}

    def _runs(self, name: str, session: Any, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        task = Task(metric=name, masking=MASKING)
        for number, run in enumerate(runs(self.evaluation[:count], self.model, task)):
            found = next(ort.run(session, [run.inputs]))[LOGITS]
            yield found, self._expected(name, number, run.inputs, LOGITS), run.labels

    def _expected(self, kind: str, number: int, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """An output of the float model, computed once."""
        if (kind, number) not in self.known:
            self.known[kind, number] = next(ort.run(self.reference, [inputs]))[output]
        return self.known[kind, number]

    def built(self, path: Path) -> dict[str, Any]:
        """What TensorRT-RTX compiles of a file."""
        recipe = Recipe.from_mapping({"gpu": "rtx4090"})
        table = kept_engine(path, recipe=recipe, shapes=self.shapes).table
        found = audit(path, table, shapes=self.shapes)
        total = sum(node.macs or 0 for node in found.nodes)
        share = sum(node.macs or 0 for node in found.nodes if node.consumed == "int8") / total
        us = predict(path, table, gpus_of(recipe)[0], shapes=self.shapes).total_us
        return {"mib": (found.weight_bytes or 0) / 2**20, "kernels": found.kernels, "int8": share, "rtx4090": us}

    def derived(self, scheme: str) -> float | None:
        """Microseconds of TensorRT on an A10, by the structure alone; None where it is not derived."""
        base = {"compiler": "tensorrt", "gpu": "a10", "tune": "off"}
        if scheme in FLOATS.values():
            recipe = Recipe.from_mapping(base)
            made = convert(self.model, unquantized_type=scheme).model
        elif scheme.startswith("int8"):
            (entry,) = entries([f"int8:{NAIVE}"], base)
            recipe = entry.recipe
            made = written(self.model, self.calibration, recipe, pricer=None).finished.model
        else:
            return None
        pricer = pricer_of(recipe, self.shapes)
        return None if pricer is None else float(pricer(made).us)

    def wrote(self, row: str, path: Path) -> None:
        """Write a row's model."""
        if row in FLOATS:
            table = self.tables.of(placement.plan(self.model, Settings()))
            save(convert(self.model, unquantized_type=FLOATS[row], table=table).model, path)
        elif row in FORMS:
            nodes = weighted_nodes(self.model, placement.plan(self.model, Settings(shift=False)))
            nodes = {name: node for name, node in nodes.items() if node.data_spec}
            tensors = list(dict.fromkeys(node.data for node in nodes.values()))
            seen = rows_of(self.model, tensors, self.calibration, len(self.calibration))
            onnx.save(Writer(self.model, nodes, seen, FORMS[row]).written(), path)
        else:
            (entry,) = entries([SCHEMES[row]], {"tune": "off", "gpu": "rtx4090"})
            done = written(self.model, self.calibration, entry.recipe, pricer=None, tables=self.tables)
            save(done.finished.model, path)


def prepared(given: argparse.Namespace) -> Bench:
    """The model and its samples, exported where they are not there yet."""
    path, samples = given.folder / "antiberty.onnx", given.folder / "samples"
    if not samples.is_dir():
        script = Path(__file__).parent / "export" / "antiberty.py"
        words = [str(path), "--samples", str(samples), "--count", str(given.calibrate + given.score)]
        subprocess.run([given.python, str(script), *words], check=True)
    model = load_float(path)
    every = open_samples(str(samples), input_specs(model))
    calibration = Samples(
        inputs=every.inputs, source=every.source, indices=every.indices[: given.calibrate], origin=every.origin
    )
    return Bench(
        model=model,
        calibration=calibration,
        evaluation=list(islice(every, given.calibrate, given.calibrate + given.score)),
        contacts=given.contacts,
        shapes={name: ShapeRange.fixed(shape.opt) for name, shape in shape_ranges(model, (), calibration).items()},
        tables=Tables(model=model, samples=calibration),
        reference=arithmetic.session(model.proto, directory=model.directory),
    )


def made(bench: Bench, row: str, folder: Path, *, compiles: bool) -> dict[str, Any]:
    """The figures of a row."""
    path = folder / f"{slug(row)}.onnx"
    if not path.exists():
        bench.wrote(row, path)
    quantized = load(path)
    session = arithmetic.session(quantized.proto, directory=quantized.directory)
    found = bench.score(session)
    if not compiles:
        return found
    scheme = FLOATS.get(row) or SCHEMES.get(row, "")
    return {**found, **bench.built(path), "a10": bench.derived(scheme) if scheme else None}


def slug(row: str) -> str:
    """A row's file."""
    return "".join(c if c.isalnum() else "_" for c in row.lower())


HEADS: Mapping[str, tuple[str, str]] = {  # of the table: figure, how it is written
    "masked accuracy": ("masked-accuracy", ".4f"),
    "pseudo-perplexity": ("pseudo-perplexity", ".4f"),
    "SQNR dB": ("sqnr_db", ".1f"),
    "cosine": ("cosine", ".5f"),
    "contacts": ("contacts", ".4f"),
    "INT8 share": ("int8", ".2f"),
    "engine MiB": ("mib", ".1f"),
    "kernels": ("kernels", "d"),
    "us, RTX 4090": ("rtx4090", ".0f"),
    "us, A10": ("a10", ".0f"),
}


def table(folder: Path) -> None:
    """Print what a folder has."""
    print(f"| | {' | '.join(HEADS)} |\n|{'---|' * (len(HEADS) + 1)}")
    for row in ROWS:
        path = folder / f"{slug(row)}.json"
        if path.exists():
            found = json.loads(path.read_text())
            cells = ("-" if found.get(key) is None else f"{found[key]:{form}}" for key, form in HEADS.values())
            print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    """Make the rows that are asked for and not there, then print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {'; '.join(ROWS)}; default: all")
    parser.add_argument("--python", default=sys.executable, help="of an environment with torch and antiberty")
    parser.add_argument("--calibrate", type=int, default=32, help="chains to calibrate with; default 32")
    parser.add_argument("--score", type=int, default=64, help="other chains, to score on; default 64")
    parser.add_argument("--contacts", type=int, default=4, help="of these, for contacts; default 4")
    parser.add_argument("--no-compile", action="store_true", help="accuracy alone")
    parser.add_argument("--show", action="store_true", help="print what is there, and make nothing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = [] if given.show else [r for r in given.rows or ROWS if not (given.folder / f"{slug(r)}.json").exists()]
    bench = prepared(given) if rows else None
    for row in rows:
        assert bench is not None
        found = made(bench, row, given.folder, compiles=not given.no_compile)
        (given.folder / f"{slug(row)}.json").write_text(json.dumps(found, indent=1))
        print(row, file=sys.stderr, flush=True)
    table(given.folder)


if __name__ == "__main__":
    record(main)
