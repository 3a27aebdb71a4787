"""Unkind options of the one search: what cannot work is said before the work, and nothing is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import build, node, normal, samples
from models import save_samples

from calib_data import DataError, open_samples
from engines.core.documents import replace
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.page.schemes import plans
from qdq.deploy.report.front_plot import draw
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.find import beside
from qdq.tune.sensitivity.mixed.front import Allocation, Tried, picked
from qdq.tune.sensitivity.mixed.mix import mix, picked_from
from qdq.tune.sensitivity.mixed.search import Search


def network() -> Model:
    """Two products."""
    nodes = [
        node("MatMul", "x w0", "h", name="n0"),
        node("Relu", "h", "t", name="r"),
        node("MatMul", "t w1", "y", name="n1"),
    ]
    weights = {"w0": normal(16, 32, seed=1), "w1": normal(32, 16, seed=2)}
    return load_float(build(nodes, {"x": (8, 16)}, weights).proto)


def tried(choice: tuple[int, ...], size: float, us: float, db: float) -> Tried:
    return Tried(
        choice=choice,
        how="",
        sum_db=db,
        sqnr_db=db,
        worst_db=db,
        size_mib=size,
        memory_mib=size,
        time_us=us,
        values={},
        keeps=True,
    )


def a_front(model: Model, **changes: Any) -> Allocation:
    """Of two groups in int8 (0), int4 (1) and float (2); the knee of size is number 1, that of time number 2."""
    found = (
        tried((2, 2), 9.0, 9.0, 60.0),
        tried((1, 0), 2.0, 8.9, 50.0),
        tried((0, 0), 8.0, 2.0, 49.0),
        tried((1, 1), 1.0, 1.0, 10.0),
    )
    made = Allocation(
        plan="",
        model_sha256=model.sha256,
        settings=Settings(),
        unquantized_type="fp16",
        candidates=("int8", "int4"),
        groups=(("n0",), ("n1",)),
        nodes={"float": 2},
        minimize="error",
        limits={},
        compiled_by="a compiler",
        gpus=("a gpu",),
        tried=found,
        chosen=0,
        allocated_db=60.0,
        steps=(),
    )
    return replace(made, **changes)


def test_the_knee_of_a_file_is_of_the_cost_that_its_search_was_for() -> None:
    model = network()
    for changes, number in (
        ({}, 1),
        ({"minimize": "time"}, 2),
        ({"limits": {"--max-latency-us": "5.00 us"}}, 2),
    ):
        assert picked_from(model, a_front(model, **changes), "knee", "")[1].chosen == number


def test_a_front_that_is_damaged_or_keeps_to_nothing_is_refused(tmp_path: Path) -> None:
    made, path = a_front(network()), tmp_path / "front.json"
    made.save(path)
    assert Allocation.load(path) == made
    for damage in ({"chosen": 9}, {"chosen": -1}, {"tried": []}, {"groups": [["n0"]]}, {"candidates": []}):
        path.write_text(json.dumps({**json.loads(made.to_json()), **damage}))
        with pytest.raises(InputError, match="name groups or candidates that it does not have"):
            Allocation.load(path)
    for pick in ("knee", "smallest", "most-accurate"):
        with pytest.raises(InputError, match="keep to every limit, and the front has none"):
            picked([replace(t, keeps=False) for t in made.tried], pick, "size_mib")


def test_a_plan_that_overflows_or_has_no_time_is_drawn_beside_the_others(tmp_path: Path) -> None:
    made = a_front(network())
    silent = replace(made.tried[2], sqnr_db=-math.inf, time_us=None, memory_mib=1.0)
    made = replace(made, tried=(*made.tried[:2], silent, made.tried[3]))
    shown = plans(made)
    assert shown is not None and [str(plot["picture"]).count("<a ") for plot in shown["plots"]] == [4, 3]
    assert picked(made.tried, "fastest", "size_mib") == 3
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'qdq[plot]'")
    draw(made, tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_equal_fronts_are_drawn_in_equal_bytes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'qdq[plot]'")
    made = a_front(network())
    draw(made, tmp_path / name)
    first = (tmp_path / name).read_bytes()
    draw(made, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first and len(first) > 1000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 'much'", "gave 'much': it must be a function .* that gives a finite number"),
        ("return float('nan')", "gave nan: it must be"),
        ("raise KeyError('z')", r"failed: KeyError: 'z' \(line 2\). It must give a finite number"),
        ("raise SystemExit(3)", "failed: SystemExit: 3"),
        ("float_['y'][...] = 0", "read-only"),
        ("sample['x'] += 1", "read-only"),
    ],
)
def test_a_function_that_gives_no_number_or_writes_to_arrays_fails_before_any_work(
    body: str, said: str, tmp_path: Path
) -> None:
    from qdq.deploy.compare.bound import bounds

    (tmp_path / "bad.py").write_text(f"def least(found, float_, sample):\n    {body}\n")
    with pytest.raises((InputError, DataError), match=said):
        bounds({f"{tmp_path}/bad.py:least": 0.0}, network(), samples(network(), 1)[0])


def test_a_metric_that_does_not_fit_the_model_or_its_labels_fails_before_any_work(tmp_path: Path) -> None:
    from qdq.deploy.compare.bound import bounds

    first = {**samples(network(), 1)[0], "few": np.zeros(3, np.int64)}
    with pytest.raises(InputError, match=r"labels of a sample have shape \[3\]; top1 needs \[8\]"):
        bounds({"top1": 0.5}, network(), first, "few")
    with pytest.raises(InputError, match="Unknown metric 'masked-accuracy'"):
        bounds({"masked-accuracy": 0.5}, network(), first)
    with pytest.raises(DataError, match=r"No such file: .*, in --min-metric"):
        bounds({f"{tmp_path}/none.py:least": 0.5}, network(), first)
    for text in ("dice=nan", "dice=inf", "=1", "dice"):
        with pytest.raises(InputError, match="must be NAME=VALUE with a number"):
            Recipe.from_mapping({"min_metric": text})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where, model = tmp_path_factory.mktemp("refusals"), network()
    onnx.save(model.proto, where / "net.onnx")
    save_samples(where / "data", samples(model, 2))
    labels = {"lab": np.zeros(8, np.int64)}
    save_samples(where / "labelled", [{**sample, **labels} for sample in samples(model, 2)])
    a_front(model).save(where / "front.json")
    return where


def test_a_search_that_is_killed_leaves_the_table_and_one_that_is_refused_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'qdq[mixed]'")
    model = load_float(folder / "net.onnx")
    data = open_samples(str(folder / "data"), input_specs(model))
    recipe = Recipe.from_mapping({"candidates": "int8,float", "minimize": "error", "max_size_mib": 1})
    for error, left in ((KeyboardInterrupt(), True), (InputError("no limit"), False)):

        def stopped(_: Search, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(Search, "best", stopped)
        with pytest.raises(type(error)):
            mix(folder / "net.onnx", model, data, recipe, output=folder / "killed.json")
        assert beside(folder / "killed.json").exists() is left


SEARCH = ("--data", "data", "--candidates", "int8,float", "--pick", "knee")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tune", *SEARCH, "--metric-labels", "lab"), "--metric-labels are what --min-metric is scored against"),
        (("tune", "--data", "data", "--plot", "a.png"), "add --minimize and a limit, or --pick"),
        (("tune", *SEARCH, "--plot", "a.xyz"), "its ending says no form of picture"),
        (("deploy", *SEARCH, "--plot", "a.xyz"), "its ending says no form of picture"),
        (("deploy", *SEARCH, "--plot", "none/a.png"), "its folder does not exist"),
        (("deploy", *SEARCH, "--plot", "broken.onnx"), "its ending says no form of picture"),
        (("sensitivity", "--data", "data", "--plot", "a.xyz"), "its ending says no form of picture"),
        (("tune", *SEARCH, "--plot", "plan.json", "-o", "plan.json"), "both write plan.json"),
        (("tune", "--front", "front.json", "--pick", "0", "--min-sqnr-db", "30"), "give --pick, and no aim or limit"),
        (
            ("tune", "--sensitivity", "p.front.json", "--minimize", "time", "-o", "p.json"),
            "is an input of this command",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_work(
    arguments: tuple[str, ...], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'qdq[plot]'")
    monkeypatch.chdir(folder)
    Path("p.front.json").write_text("{}")
    Path("broken.onnx").write_bytes(b"no model: whoever reads it says so")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    place = ("--out", "out") if arguments[0] == "deploy" else () if "-o" in arguments else ("-o", "out.json")
    result = CliRunner().invoke(main, (arguments[0], "broken.onnx", *arguments[1:], *place))
    assert result.exit_code == 2 and said in " ".join(result.output.split()), result.output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_labels_lie_beside_the_inputs_of_the_samples_that_are_calibrated_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'qdq[mixed]'")
    monkeypatch.chdir(folder)
    asked = ("--data", "labelled", "--candidates", "int8,float", "--minimize", "size", "--metric-labels", "lab")
    for verb in (("tune", "-o", "labels.json"), ("deploy", "--workers", "1", "--out", "labels")):
        given = (verb[0], "net.onnx", *verb[1:], *asked, "--min-metric", "top1=0")
        result = CliRunner().invoke(main, given)
        assert result.exit_code == 0, result.output
    assert Allocation.load("labels.front.json").best.values == Allocation.load("labels/front.json").best.values != {}
