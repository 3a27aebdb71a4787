"""The least error within a size: no choice of the groups has less, it compiles to the size, the plan is ordinary."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import build, node, normal, samples
from models import save_samples

from calib_data import open_samples
from engines.core.documents import replace
from qdq.assemble.quantize import quantize
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.core.errors import InputError, MissingRuntimeError
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.find import find
from qdq.tune.sensitivity.mixed.allocate import Sum, least, neighbours
from qdq.tune.sensitivity.mixed.front import Allocation
from qdq.tune.sensitivity.mixed.mix import mix
from qdq.tune.sensitivity.table import Sensitivity

pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'qdq[mixed]'")


def costs(groups: int, seed: int) -> tuple[Sum, Sum]:
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-7, -2, groups)
    noise = [{"int4": float(s), "int8": float(s) / 300, "float": 0.0} for s in scale]
    size = [{"int4": float(n), "int8": 1.9 * n, "float": 3.8 * n} for n in rng.integers(100, 10_000, groups)]
    return Sum(groups=noise), Sum(groups=size)


def every_choice(groups: int) -> list[tuple[str, ...]]:
    return list(itertools.product(("int4", "int8", "float"), repeat=groups))


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_of_the_same_size_has_a_smaller_sum(seed: int) -> None:
    noise, size = costs(8, seed)
    smallest, largest = (sum(pick(own.values()) for own in size.groups) for pick in (min, max))
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        most = smallest + share * (largest - smallest) + 1e-6
        found = least(noise, [(size, most)])
        assert found is not None and size.of(found) <= most * (1 + 1e-9)
        best = min(noise.of(each) for each in every_choice(8) if size.of(each) <= most)
        assert noise.of(found) == pytest.approx(best, rel=2e-6, abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_pairs_count_in_what_is_minimized_and_in_limits(seed: int) -> None:
    noise, size = costs(5, seed)
    rng = np.random.default_rng(seed)
    names = ("int4", "int8", "float")

    def pairs(scale: float) -> dict[tuple[int, int], dict[tuple[str, str], float]]:
        both = itertools.product(names, names)
        return {(g, g + 1): {b: float(scale * rng.normal()) for b in both if b[0] != b[1]} for g in range(4)}

    noise, size = replace(noise, pairs=pairs(1e-3), base=1e-4), replace(size, pairs=pairs(2000.0), base=500.0)
    most = float(np.quantile([size.of(each) for each in every_choice(5)], 0.3))
    found = least(noise, [(size, most)])
    assert found is not None and size.of(found) <= most + 1e-6 * abs(most)
    best = min(noise.of(each) for each in every_choice(5) if size.of(each) <= most)
    assert noise.of(found) == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert least(noise, [(size, min(map(size.of, every_choice(5))) - 1.0)]) is None


def test_choices_next_to_one_are_small_enough_and_the_least_noise_comes_first() -> None:
    noise, size = costs(5, 1)
    most = 0.6 * sum(own["float"] for own in size.groups)
    chosen = least(noise, [(size, most)])
    assert chosen is not None
    near = neighbours(noise, chosen, [(size, most)])
    assert near and chosen not in near
    assert all(size.of(each) <= most and sum(a != b for a, b in zip(each, chosen, strict=True)) <= 2 for each in near)
    sums = [noise.of(each) for each in near]
    assert sums == sorted(sums)


def test_what_cannot_be_chosen_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, size = costs(3, 0)
    assert least(noise, [(size, 100.0)]) is None
    infinite = replace(noise, groups=[{**own, "int4": float("inf")} for own in noise.groups])
    assert "int4" not in (least(infinite, [(size, 1e9)]) or ("int4",))
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'qdq\[mixed\]'"):
        least(noise, [(size, 1e9)])


def network() -> Model:
    """Four products in a row, the second of many weights."""
    sizes = (64, 128, 256, 64, 64)
    nodes, weights = [], {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{i}"] = normal(inputs, outputs, seed=i) / inputs**0.5
        nodes += [node("MatMul", f"t{i} w{i}", f"h{i}", name=f"n{i}"), node("Relu", f"h{i}", f"t{i + 1}", name=f"r{i}")]
    return load_float(build(nodes[:-1], {"t0": (16, 64)}, weights, outputs=("h3",)).proto)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    where = tmp_path_factory.mktemp("mixed")
    model = network()
    onnx.save(model.proto, where / "net.onnx")
    save_samples(where / "data", samples(model, 4))
    return where


def made(
    folder: Path, mib: float, texts: tuple[str, ...] = (), known: Sensitivity | None = None
) -> tuple[Plan, Allocation]:
    model = load_float(folder / "net.onnx")
    data = open_samples(str(folder / "data"), input_specs(model))
    recipe = Recipe(minimize="error", max_size_mib=mib, candidates=texts)
    return mix(folder / "net.onnx", model, data, recipe, known=known)


def test_the_plan_is_ordinary_small_enough_and_better_than_one_precision_of_that_size(folder: Path) -> None:
    plan, found = made(folder, 0.070, texts=("int8", "int4", "float"))
    assert found.size_mib <= 0.070 < found.float_mib
    assert len(found.nodes) > 1 and sum(found.nodes.values()) == 4
    assert found.measured_db >= found.allocated_db
    assert abs(found.measured_db - found.sum_db) < 1.5
    plan.save(folder / "plan.json")
    assert Plan.load(folder / "plan.json") == plan
    model = load_float(folder / "net.onnx")
    data = open_samples(str(folder / "data"), input_specs(model))
    whole = quantize(model, data, plan=plan)
    assert whole.plan.quantized_nodes == plan.quantized_nodes
    _, everything = made(folder, 0.045, texts=("int4", "float"))
    assert everything.measured_db < found.measured_db - 3
    assert everything.nodes["int4"] >= 3


def test_a_table_made_before_gives_the_same_plan_and_one_of_others_is_refused(folder: Path) -> None:
    model = load_float(folder / "net.onnx")
    data = open_samples(str(folder / "data"), input_specs(model))
    texts = ("int8", "int4", "float")
    known = find(folder / "net.onnx", model, data, settings=Settings(), texts=texts)
    assert made(folder, 0.070, known=known) == made(folder, 0.070, texts=texts)
    with pytest.raises(InputError, match="from another model"):
        made(folder, 0.070, known=replace(known, model_sha256="0" * 64))
    with pytest.raises(InputError, match="is for --compiler tensorrt"):
        made(folder, 0.070, known=replace(known, settings=Settings(compiler="tensorrt")))
    with pytest.raises(InputError, match="leave them out"):
        made(folder, 0.070, known=known, texts=texts)
    with pytest.raises(InputError, match="has no group of 'n0': give the exclude"):
        made(folder, 0.070, known=replace(known, groups=known.groups[1:]))


def test_a_plan_by_a_table_follows_its_own_settings_and_says_that_samples_are_others(folder: Path) -> None:
    model = load_float(folder / "net.onnx")
    save_samples(folder / "others", samples(model, 5)[3:])
    data, others = (open_samples(str(folder / name), input_specs(model)) for name in ("data", "others"))
    known = find(folder / "net.onnx", model, data, settings=Settings(), texts=("int8", "int4", "float"))

    def mixed(kind: str = "auto", **given: Any) -> tuple[Plan, Allocation]:
        settings = Settings(**given)
        recipe = Recipe(settings=settings, unquantized_type=kind, minimize="error", max_size_mib=0.09)
        return mix(folder / "net.onnx", model, others, recipe, known=known)

    plan, found = mixed(rounding="nearest", exclude=("n1",), overrides={"n0": "fp8"})
    assert plan.settings.rounding == "nearest" and "n1" not in plan.quantized_nodes
    assert {p.spec.format for p in plan.points if ("n0", 0) in p.uses} == {"fp8"}
    assert sum(found.nodes.values()) == 2 and "the table's errors are those of other samples" in found.steps
    assert {p.spec.format for p in mixed(overrides={"n0": "fp8"})[0].points if ("n0", 0) in p.uses} == {"fp8"}
    for given, message in (
        ({"block": 32}, "is for --block auto, and the plan for 32"),
        ({"shift": False}, "is for --shift True, and the plan for False"),
        ({"kind": "bf16"}, "is for --unquantized-type fp16, and the plan for bf16"),
    ):
        with pytest.raises(InputError, match=message):
            mixed(**given)


def test_the_verbs_take_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    mixing = ("--data", "data", "--minimize", "error", "--max-size-mib")
    said = run("tune", "net.onnx", *mixing, "0.07", "--candidates", "int8,int4,float", "-o", "p.json")
    assert "--max-size-mib 0.07 MiB" in said and "int8" in said
    shown = run("deploy", "net.onnx", *mixing, "0.07", "--candidates", "int8,int4,float", "--out", "out")
    assert "chosen for: least error" in shown and "not tuned: the plan was given" not in shown
    assert Plan.load("out/plan.json").quantized_nodes == Plan.load("p.json").quantized_nodes
    for arguments, message in (
        (("tune", "net.onnx", *mixing, "0.01", "-o", "q.json"), "the least reachable is"),
        (("tune", "net.onnx", *mixing, "0", "-o", "q.json"), "max_size_mib"),
        (("tune", "net.onnx", "--data", "data", "--minimize", "error", "-o", "q.json"), "give --max-size-mib"),
        (("tune", "net.onnx", "--data", "data", "--max-size-mib", "1", "-o", "q.json"), "add --minimize time"),
        (("tune", "net.onnx", "--data", "data", "--candidates", "int8", "-o", "q.json"), "add --minimize time"),
        (("tune", "net.onnx", *mixing, "1", "--min-sqnr-db", "99", "-o", "q.json"), "the most that was reached is"),
        (("tune", "net.onnx", "--minimize", "space", "-o", "q.json"), "Unknown thing to minimize"),
        (("deploy", "net.onnx", *mixing, "1", "--plan", "p.json", "--out", "o"), "leave out --plan"),
        (("tune", "net.onnx", "--data", "data", "--minimize", "size", "-o", "q.json"), "give --min-sqnr-db or"),
        (("tune", "net.onnx", "--data", "data", "--pick", "3", "-o", "q.json"), "give the file with --front"),
        (("tune", "net.onnx", "--front", "p.front.json", "-o", "q.json"), "give --pick"),
        (("tune", "net.onnx", "--front", "p.front.json", "--pick", "99", "-o", "q.json"), "the choices 0 to"),
    ):
        assert message in run(*arguments, code=2), arguments
    assert not Path("q.json").exists() and not list(folder.glob(".*.checkpoint"))
    said = run("deploy", "net.onnx", "--data", "data", "--tune", "off", "--max-size-mib", "0.01", "--out", "o", code=1)
    assert "max_size_mib is 0.01" in said and "max_size_mib" in Path("o/provenance.json").read_text()
    assert "Weights in the engine" in Path("o/report.html").read_text()


def test_every_size_in_between_has_less_error_the_larger_it_is(folder: Path) -> None:
    found = [made(folder, mib, texts=("int8", "int4", "float"))[1] for mib in (0.05, 0.09, 0.14)]
    assert [row.best.keeps for row in found] == [True] * 3
    assert found[0].measured_db < found[1].measured_db < found[2].measured_db
