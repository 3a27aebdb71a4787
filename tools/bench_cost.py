"""How true predicted times are: models of time held against published latencies of TensorRT engines.

Fits the constants of `engines.cost.kernel`, and those of the reference model, on the clean rows, and tests them by
leaving out one GPU, and one family of one GPU. Needs qdq[cpu] without a GPU, a minute, and a folder with
published_latencies.csv and kernel_tables.json.gz:

    python tools/bench_cost.py FOLDER               the tables
    python tools/bench_cost.py FOLDER --pairs       also every ratio of INT8 and FP16
    python tools/bench_cost.py FOLDER --write       also engines/cost/constants.py
    python tools/bench_cost.py FOLDER --parts       also what each part of the model is worth, and which the rows choose
                                                    (ten minutes)

Rows of trtexec without a CUDA graph have one more constant, what a kernel costs their host, in the reference too; it is
no part of what is predicted. A ratio is INT8 / FP16 of one network, GPU and source. Each figure is of rows that had no
part in the fit, unless it says "seen".
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from costs.fit import corrected, fitted, left_out, ratio_pairs, score, starts_left_out
from costs.models import Held, Launched, Model, Ours, Reference, Roofline
from costs.published import Row, read_rows
from results import record

from engines.cost.constants import CONSTANTS
from engines.cost.family import FAMILIES
from engines.cost.kernel import Batch

Array = npt.NDArray[Any]
TARGET = Path(__file__).parents[1] / "engines" / "cost" / "constants.py"
FEWEST = 10  # clean rows of a family that an error is stated for
USUAL = 2 / 3  # share of the rows that keep to it
HEAD = f"{'':46}{'rows':>5}{'error':>7}{'rank':>7} |{'pairs':>6}{'ratio':>7}{'rank':>6}{'sign':>6}"
# part -> constants that switch it off
PARTS: Mapping[str, Mapping[str, float]] = {
    "all": {},
    "no fill of waves": {"fill": 0.0},
    "no loss by small tiles of convolutions": {"small_tiles": 1.0},
    "no clock under load": {"clock": 1e-6},
    "no start of products": {"product_start_us": 1e-6},
    "all of L2 keeps activations": {"kept": 0.999},
    "attention at the rate of products": {"attention": 1.0},
    "INT8 at the share of FP16": {"int8": 1.0, "grouped_int8": 1.0},
    "half rates at the share of full ones": {"halved": 1.0},
    "sm75 as the others": {"turing": 1.0},
}


def main() -> None:
    """Prints the tables; writes the constants where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="with published_latencies.csv and kernel_tables.json.gz")
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.name}")
    parser.add_argument("--pairs", action="store_true", help="also list every ratio of INT8 and FP16")
    parser.add_argument("--parts", action="store_true", help="also leave out each part of the model")
    given = parser.parse_args()
    every, others = read_rows(given.folder)
    rows = [row for row in every if row.quality == "clean"]
    print(f"{len(rows)} clean rows: {_counts(row.gpu_name for row in rows)}")
    print(f"families: {_counts(row.family for row in rows)}")
    print(f"left out: {_counts(others) or 'none'}\n")
    ours = Launched(Ours(rows), rows)
    models: dict[str, Model] = {
        "roofline of before": Roofline(rows),
        "reference": Launched(Reference(rows), rows),
        "ours": ours,
    }
    unseen = {name: _compare(name, model, rows) for name, model in models.items()}
    _two_factors(ours, rows)
    _choices(rows, unseen["ours"])
    if given.pairs:
        _pairs(rows, unseen["ours"])
    for name in ("reference", "ours"):
        _by_kind(name, rows, unseen[name])
    constants = fitted(models["ours"], rows, np.ones(len(rows), bool))
    print(f"\nlaunches of rows without a CUDA graph: {constants.pop('launch_us'):.1f} us a kernel")
    print("constants:", ", ".join(f"{name} {value:.4g}" for name, value in constants.items()))
    _unfitted([row for row in every if row.quality != "clean"], constants)
    if given.parts:
        _parts(rows, models["ours"])
    if given.write:
        TARGET.write_text(source(constants, errors(rows, unseen["ours"])))
        print(f"\nwritten: {TARGET.name}")


def _counts(names: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def line(name: str, rows: Sequence[Row], predicted: Array) -> str:
    """A row of a table."""
    s = score(rows, predicted)
    ratios = f"{s.pairs:6}{s.ratio_error:7.3f}{s.ratio_rank:6.2f}{s.ratio_sign:6.2f}" if s.pairs else f"{0:6}"
    rank = f"{s.rank:7.3f}" if s.rows > 2 else f"{'':7}"
    return f"{name:46}{s.rows:5}{s.error:7.3f}{rank} |{ratios}"


def _compare(name: str, model: Model, rows: Sequence[Row]) -> Array:
    """The scores of a model; gives what it predicts of GPUs that were left out."""
    if name.startswith("roofline"):
        print(HEAD)
    seen = model(fitted(model, rows, np.ones(len(rows), bool)))
    gpu = left_out(model, rows, [row.gpu_name for row in rows])
    pair = left_out(model, rows, [row.group for row in rows])
    print(line(f"{name}, seen", rows, seen))
    print(line(f"{name}, GPU left out", rows, gpu))
    print(line(f"{name}, GPU and family left out", rows, pair))
    others = f"GPU and family left out {corrected(rows, pair):.3f}, seen {corrected(rows, seen):.3f}"
    each = {label: corrected([rows[i] for i in mine], gpu[mine]) for label, mine in _groups(rows, "gpu_name").items()}
    print(f"  one factor per GPU from four points, GPU left out: {corrected(rows, gpu):.3f} ({_known(each)}); {others}")
    return gpu


def _two_factors(model: Launched, rows: Sequence[Row]) -> None:
    """What four points of a GPU make of it by `engines.cost.correction`, as `qdq measure-gpu` takes them."""
    us, starts = starts_left_out(model, rows, [row.gpu_name for row in rows])
    pair = corrected(rows, *starts_left_out(model, rows, [row.group for row in rows]))
    groups = _groups(rows, "gpu_name").items()
    each = {label: corrected([rows[i] for i in mine], us[mine], starts[mine]) for label, mine in groups}
    print("  a factor of starts and one of all else per GPU from four points, GPU left out: ", end="")
    print(f"{corrected(rows, us, starts):.3f} ({_known(each)}); GPU and family left out {pair:.3f}")


def _choices(rows: Sequence[Row], predicted: Array) -> None:
    """INT8 / FP16 ratios, and what who decides by them loses: in TensorRT, always INT8, as TensorRT-RTX's INT8 says.

    That is TensorRT-RTX's own INT8 kernels on the same GPU, of the pairs whose table is known. A loss is the mean time
    of what is chosen over that of the faster form.
    """
    measured = np.array([row.measured_us for row in rows])
    rtx = np.array([_by_rtx(row) for row in rows])
    print("\nINT8 or FP16 in TensorRT, ours with the GPU left out; error, sign, loss of time by the choice")
    print(f"{'':46}{'pairs':>6}{'':3}{'TensorRT':>20}{'always INT8':>20}{'RTX, before':>20}")
    pairs = [(i, j) for i, j in ratio_pairs(rows) if rtx[i] == rtx[i]]
    for family in (*FAMILIES, ""):
        mine = [(i, j) for i, j in pairs if family in ("", rows[i].family)]
        if not mine:
            continue
        true = np.array([measured[i] / measured[j] for i, j in mine])
        ours = np.array([predicted[i] / predicted[j] for i, j in mine])
        always, before = np.full(len(mine), np.median(true)), np.array([rtx[i] for i, _ in mine])
        cells = []
        for ratio, quantizes in ((ours, ours < 1), (always, np.ones(len(mine), bool)), (before, before < 1)):
            lost = np.where(quantizes, true, 1.0) / np.minimum(true, 1.0)
            error = np.median(np.abs(ratio / true - 1))
            cells.append(f"{error:8.3f}{np.mean(quantizes == (true < 1)):6.2f}{lost.mean():6.2f}")
        print(f"  {family or 'all':44}{len(mine):6}{'':3}{''.join(cells)}")
    print("  (always INT8: the error is that of the median ratio of the family, which nobody knows beforehand)")


def _pairs(rows: Sequence[Row], predicted: Array) -> None:
    """Every pair; "extra" is by how much more INT8 takes beyond its prediction than FP16 does, in microseconds."""
    print(f"\nINT8 and FP16 in TensorRT, us, ours with the GPU left out\n{'':46}FP16   INT8  ratio  predicted  extra")
    for i, j in sorted(ratio_pairs(rows), key=lambda both: (rows[both[0]].family, rows[both[0]].pair)):
        int8, fp16 = rows[i].measured_us, rows[j].measured_us
        what = " ".join((rows[i].gpu_name, *rows[i].pair[2:5], rows[i].pair[0].rpartition("/")[2]))[:45]
        extra = (int8 - predicted[i]) - (fp16 - predicted[j])
        ratios = f"{int8 / fp16:7.2f}{predicted[i] / predicted[j]:11.2f}"
        print(f"{what:45}{fp16:6.0f}{int8:7.0f}{ratios}{extra:7.0f}")


def _by_rtx(row: Row) -> float:
    """The INT8 / FP16 ratio of TensorRT-RTX's own kernels, by the constants as they stand; nan where not known."""
    if row.precision != "int8" or row.own is None:
        return float("nan")
    kernels = [
        [replace(k, work=k.work.scaled(scale)) for k in table.kernels]
        for table, scale in ((row.own, row.own_scale), (row.table, row.scale))
    ]
    batch = Batch.of([(some, row.gpu) for some in kernels])
    int8, fp16 = batch.sums(batch.times(CONSTANTS).total)
    return float(int8 / fp16)


def _known(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {error:.3f}" for label, error in errors.items() if error == error)


def _groups(rows: Sequence[Row], attribute: str) -> dict[str, Array]:
    """Value of an attribute -> indices of its rows."""
    labels = np.array([getattr(row, attribute) for row in rows])
    return {label: np.flatnonzero(labels == label) for label in dict.fromkeys(labels.tolist())}


def _by_kind(name: str, rows: Sequence[Row], predicted: Array) -> None:
    """The scores by GPU, family and precision."""
    print(f"\n{name}, GPU left out, by kind\n{HEAD}")
    for attribute in ("gpu_name", "family", "precision"):
        for label, mine in _groups(rows, attribute).items():
            print(line(f"  {label}", [rows[i] for i in mine], predicted[mine]))


def _unfitted(rows: Sequence[Row], constants: Mapping[str, float]) -> None:
    """Rows with host time, or of another batch than the engine was tuned for: no constant comes from them."""
    print(f"\nrows that nothing is fitted on, by the constants of all clean rows\n{HEAD}")
    for quality, mine in _groups(rows, "quality").items():
        some = [rows[i] for i in mine]
        print(line(f"  {quality}, reference", some, Reference(some)(_reference_of(some))))
        print(line(f"  {quality}, ours", some, Ours(some)(constants)))


def _reference_of(rows: Sequence[Row]) -> dict[str, float]:
    """The reference's constants as they stand in tools/cost_reference.py."""
    names = list(Reference(rows).priors)
    values = (3.28, 2.8, 1.5, 0.82, 13.1, 0.38, 0.85, 0.945, 0.31, 0.7, 1.6, 0.25, 0.5)
    return dict(zip(names, values, strict=True))


def _parts(rows: Sequence[Row], model: Model) -> None:
    """Each part switched off; and a form chosen without the rows it is tested on, GPU by GPU."""
    gpus = np.array([row.gpu_name for row in rows])
    print(f"\nparts of ours, GPU left out\n{HEAD}")
    forms: dict[str, Model] = {name: Held(model, held) for name, held in PARTS.items()}
    for name, form in forms.items():
        print(line(f"  {name}", rows, left_out(form, rows, gpus.tolist())))
    nested = np.zeros(len(rows))
    for label in sorted(set(gpus.tolist())):
        out = gpus == label
        inner = [row for row, gone in zip(rows, out, strict=True) if not gone]
        tried = {name: Held(Launched(Ours(inner), inner), held) for name, held in PARTS.items()}
        labels = [row.gpu_name for row in inner]
        best = min(tried, key=lambda name: score(inner, left_out(tried[name], inner, labels)).log_error)
        nested[out] = forms[best](fitted(forms[best], rows, ~out))[out]
        print(f"    without {label}: {best}")
    print(line("  form chosen by the other GPUs", rows, nested))


def errors(rows: Sequence[Row], predicted: Array) -> dict[str, tuple[int, float, int, float]]:
    """Family -> clean rows, error that two thirds of them keep to, pairs, the same of their ratios."""
    measured = np.array([row.measured_us for row in rows])
    off = np.abs(predicted / measured - 1)
    found: dict[str, tuple[int, float, int, float]] = {}
    pairs = ratio_pairs(rows)
    ratios = np.array([predicted[i] / predicted[j] / (measured[i] / measured[j]) - 1 for i, j in pairs])
    for family in FAMILIES:
        mine = np.array([row.family == family for row in rows])
        both = np.array([rows[i].family == family for i, _ in pairs], bool)
        found[family] = (int(mine.sum()), _usual(off[mine]), int(both.sum()), _usual(np.abs(ratios[both])))
    return found


def _usual(values: Array) -> float:
    """The value that two thirds keep to; nan where too few are known."""
    return float(np.quantile(values, USUAL)) if len(values) >= FEWEST else float("nan")


def source(constants: Mapping[str, float], found: Mapping[str, tuple[int, float, int, float]]) -> str:
    """The text of engines/cost/constants.py."""
    values = "\n".join(f"    {name}={value:.4g}," for name, value in constants.items())
    lines = (
        f"        {family!r}: Expected(rows={rows}, time={_text(time)}, pairs={pairs}, ratio={_text(ratio)}),"
        for family, (rows, time, pairs, ratio) in found.items()
    )
    known = "\n".join(lines).replace("'", '"')
    return f'''"""Constants of `engines.cost.kernel`, and how true predicted times are.

Made by `python tools/bench_cost.py ../shared/data --write`; edit the tool, not this file. Fitted on the clean rows of
published_latencies.csv there; an error is that which two of three rows keep to on GPUs that were left out of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engines.cost.family import Expected
from engines.cost.kernel import Constants

CONSTANTS = Constants(
{values}
)

EXPECTED: Mapping[str, Expected] = MappingProxyType(
    {{
{known}
    }}
)
'''


def _text(value: float) -> str:
    """Two digits; None where it is not known."""
    return "None" if value != value else f"{value:.2f}"


if __name__ == "__main__":
    record(main)
