"""Every method and source is one file: members are found by themselves, and a new file is an option everywhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import graphs
import numpy as np
import pytest
from click.testing import CliRunner

from calib_data import DataError, InputSpec, open_samples
from calib_data.sources import Form, forms
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.core.members import Members
from qdq.deploy.compare.metrics import METRICS
from qdq.measure.calibrators import CALIBRATORS, Calibrator
from qdq.plan import methods
from qdq.plan.scheme import SCHEMES
from qdq.plan.settings import Settings, choices
from qdq.solve.equalize.formulas import FORMULAS, Formula
from qdq.solve.rounding import ROUNDINGS, Rounding

REGISTRIES: list[tuple[Members[object], Members[object], type]] = [
    (CALIBRATORS, methods.CALIBRATORS, Calibrator),
    (ROUNDINGS, methods.ROUNDINGS, Rounding),
    (FORMULAS, methods.FORMULAS, Formula),
]
Add = Callable[[str, str], None]

CALIBRATOR = """
from qdq.measure.calibrators import Calibrator
CALIBRATOR = Calibrator(limit=lambda hist, fmt, percentile: hist.amax / 2)
"""
ROUNDING = """
import numpy as np
from qdq.solve.rounding import Rounding
from qdq.solve.rounding.nearest import block_scales

def floor(W, scale, hessian, *, low, high, float_codes=None):
    return np.clip(np.floor(W / scale), low, high)

ROUNDING = Rounding(block_scales=block_scales, round_rows=floor, needs_moments=True)
"""
FORMULA = """
import numpy as np
from qdq.solve.equalize.formulas import Formula
FORMULA = Formula(candidates=lambda amax, wmax: [np.where(np.arange(amax.size), 1.0, 0.5)], minimum_gain_db=-np.inf)
"""
SOURCE = """
from pathlib import Path
import numpy as np
from calib_data.sources import ArrayForm, Form, RawSample, SampleShapes
from calib_data.sources.function import PythonFunction

def read(source):
    return [{"x": np.float32(line.split())} for line in Path(source).read_text().splitlines()]

FORM = Form(
    says="a text file of numbers",
    owns=lambda source: source.endswith(".txt"),
    open=lambda source, inputs: PythonFunction(where=source, function=lambda: read(source)),
    arrays=lambda source: {n: ArrayForm(a.shape, a.dtype) for n, a in read(source)[0].items()},
)
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Puts a file `toy.py` beside the members of a package."""
    made: list[str] = []

    def put(package: str, text: str) -> None:
        (tmp_path / "toy.py").write_text(text, encoding="utf-8")
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
        made.append(f"{package}.toy")

    yield put
    for name in made:
        sys.modules.pop(name, None)


def help_of(verb: str) -> str:
    done = CliRunner().invoke(main, [verb, "--help"])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(("found", "facts", "kind"), REGISTRIES, ids=[kind.__name__ for _, _, kind in REGISTRIES])
def test_every_member_defines_one_value_and_says_which_settings_it_reads(
    found: Members[object], facts: Members[object], kind: type
) -> None:
    assert list(found) == list(facts) and len(found) >= 3
    known = Settings().to_mapping()
    for name, member in found.items():
        assert isinstance(member, kind), name
        assert set(getattr(member, "settings", ())) <= known.keys(), name
        assert sys.modules[f"{kind.__module__}.{name}"].__doc__, name
    assert "nowhere" not in found
    with pytest.raises(KeyError):
        found["nowhere"]


@pytest.mark.parametrize("setting", ["scheme", "calibrator", "rounding", "equalize", "bias_correction", "block"])
def test_help_and_errors_list_what_a_setting_may_be(setting: str) -> None:
    text = help_of("plan")
    for choice in choices(setting):
        assert str(choice) in text
        assert getattr(Settings.from_mapping({"scheme": "int4", setting: choice}), setting) == choice
    with pytest.raises(InputError) as caught:
        Settings.from_mapping({setting: "nonsense"})
    assert all(str(choice) in str(caught.value) for choice in choices(setting))


def test_the_help_of_compare_lists_every_metric_and_every_form_of_data() -> None:
    text = help_of("compare").replace("- ", "-")  # lines may end inside a name
    assert all(name in text for name in METRICS)
    assert all(form.says in text for form in forms())


@pytest.mark.parametrize(
    ("package", "text", "setting"),
    [
        ("qdq.measure.calibrators", CALIBRATOR, "calibrator"),
        ("qdq.solve.rounding", ROUNDING, "rounding"),
        ("qdq.solve.equalize.formulas", FORMULA, "equalize"),
    ],
)
def test_a_new_file_is_an_option(add: Add, package: str, text: str, setting: str) -> None:
    assert "toy" not in choices(setting)
    add(package, text)
    assert getattr(Settings.from_mapping({setting: "toy"}), setting) == "toy"
    assert "toy" in help_of("quantize")
    with pytest.raises(InputError, match="Did you mean 'toy'"):
        Settings.from_mapping({setting: "tooy"})


def test_a_new_calibrator_is_used(add: Add) -> None:
    add("qdq.measure.calibrators", CALIBRATOR)
    model = graphs.product()
    data = graphs.samples(model, 3)
    half, whole = (
        graphs.quantized(model, data, calibrator=name, shift=False, equalize="none").solution.activations["x"]
        for name in ("toy", "max")
    )
    assert float(half.scale) == pytest.approx(float(whole.scale) / 2)


def test_a_new_rounding_is_used(add: Add) -> None:
    add("qdq.solve.rounding", ROUNDING)
    model = graphs.product()
    made = graphs.quantized(model, graphs.samples(model, 3), rounding="toy", equalize="none")
    (found,) = made.solution.weights.values()
    weight = model.array(made.plan.weights[0].tensor).astype(np.float64)
    assert np.array_equal(found.codes.astype(int), np.floor(weight / found.params.scale).clip(-127, 127))


def test_a_new_formula_is_used(add: Add) -> None:
    add("qdq.solve.equalize.formulas", FORMULA)
    model = graphs.product()
    divisor = graphs.quantized(model, graphs.samples(model, 3), equalize="toy").solution.divisors["x"]
    assert divisor.tolist() == [0.5, *[1.0] * (divisor.size - 1)]


def test_a_new_source_is_asked_for_the_path(add: Add, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text("1 2\n3 4\n", encoding="utf-8")
    inputs = [InputSpec(name="x", dtype="float32", shape=(2,))]
    with pytest.raises(DataError, match="Cannot read"):
        open_samples(tmp_path / "numbers.txt", inputs)
    add("calib_data.sources", SOURCE)
    assert [s["x"].tolist() for s in open_samples(tmp_path / "numbers.txt", inputs)] == [[1, 2], [3, 4]]
    assert "a text file of numbers" in help_of("calibrate")
    with pytest.raises(DataError, match="a text file of numbers"):
        open_samples(tmp_path / "numbers.bin", inputs)


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.says)
def test_no_form_owns_what_does_not_exist_but_a_function(form: Form, tmp_path: Path) -> None:
    assert not form.owns(str(tmp_path / "nothing"))
    assert not form.owns(str(tmp_path / "nothing.npz"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_names_what_exists(scheme: str) -> None:
    made = Settings(scheme=scheme)
    assert set(made.options("rounding")) <= set(ROUNDINGS)
    assert set(made.options("equalize")) <= set(choices("equalize")) - {"auto"}
    assert made.idle == ()
