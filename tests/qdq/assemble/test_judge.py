"""Settings that say 'auto': what is best on samples it was not fitted on; the first where nothing is clearly so."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from graphs import build, node, normal
from models import assemble, constant
from onnx import helper

from engines.core.documents import replace
from qdq.assemble import judge
from qdq.assemble.held_out import comparable, energies
from qdq.assemble.judge import judged
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings

POWERS = np.geomspace(1, 300, 32).astype(np.float32)[np.random.default_rng(4).permutation(32)]
CAUTIOUS, STRONG = "smoothquant", "validated"


def outliers() -> Model:
    """x -> MatMul -> y, whose small input channels have large weights: all channels matter alike."""
    return build([node("MatMul", "x w", "y")], {"x": (64, 32)}, {"w": normal(32, 16) / POWERS[:, None]})


def steady(count: int = 9) -> list[graphs.Sample]:
    return [{"x": s["x"] * POWERS} for s in graphs.samples(outliers(), count)]


def shifting(count: int = 9) -> list[graphs.Sample]:
    """Each sample has other channels large: what was small while fitting is large later."""
    rng = np.random.default_rng(7)
    return [{"x": s["x"] * POWERS[rng.permutation(32)]} for s in graphs.samples(outliers(), count)]


def taken(
    data: list[graphs.Sample] | None, model: Model | None = None, **settings: object
) -> tuple[Settings, tuple[str, ...]]:
    model = model or outliers()
    given = Settings.from_mapping({"rounding": "nearest", "shift": True, **settings})
    plan, notes = judged(model, placement.plan(model, given), data)
    assert not plan.settings.open
    return plan.settings, notes


def test_outlier_channels_that_stay_take_the_strong_formula() -> None:
    settings, notes = taken(steady())
    assert settings.equalize == STRONG
    assert all(f"{name} " in notes[0] for name in (CAUTIOUS, STRONG, "none"))


def test_outlier_channels_that_move_do_not() -> None:
    assert taken(shifting())[0].equalize != STRONG


def test_a_daring_option_must_win_in_every_turn_and_another_over_all() -> None:
    first = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    mostly = [[0.1, 0.1], [0.1, 0.1], [0.99, 0.99]]
    assert judge._best({"smoothquant": first, "validated": mostly}) == "smoothquant"
    assert judge._best({"smoothquant": first, "none": mostly}) == "none"
    slightly = [[0.97, 0.97]] * 3
    assert judge._best({"gptq": first, "nearest": slightly}) == "gptq"


def test_headroom_that_costs_next_to_nothing_is_taken_and_dearer_one_is_not() -> None:
    first = [[1.0, 1.0]] * 3
    assert judge._best({"mse": first, "ample": [[1.05, 1.05]] * 3, "max": [[1.1, 1.1]] * 3}) == "ample"
    assert judge._best({"mse": first, "ample": [[1.1, 1.1]] * 3, "max": [[1.1, 1.1]] * 3}) == "mse"
    assert judge._best({"mse": first, "ample": [[1.05, 1.05]] * 3, "max": [[0.7, 0.7]] * 3}) == "max"


def test_a_rounding_fitted_to_data_must_not_lose_to_a_plain_one_in_any_turn() -> None:
    clip = [[1.0, 1.0]] * 3
    mostly = [[0.1, 0.1], [0.1, 0.1], [1.1, 1.1]]
    always = [[0.1, 0.1], [0.1, 0.1], [1.02, 1.02]]
    assert judge._best({"descent": mostly, "clip": clip, "nearest": [[2.0, 2.0]] * 3}) == "clip"
    assert judge._best({"descent": always, "clip": clip, "nearest": [[2.0, 2.0]] * 3}) == "descent"


def quieter(scale: float) -> list[graphs.Sample]:
    """Of every third sample, a quiet one, other channels are large."""
    rng = np.random.default_rng(1)
    return [
        {"x": np.abs(s["x"]) * (POWERS if i % 3 else POWERS[rng.permutation(32)] * np.float32(scale))}
        for i, s in enumerate(graphs.samples(outliers(), 9))
    ]


def test_a_note_says_why_an_option_of_less_noise_is_not_taken() -> None:
    """Over all turns it wins, and in one it loses: both are said."""
    noise = {CAUTIOUS: [[1.0, 1.0], [1.0, 1.0]], STRONG: [[0.1, 0.1], [1.2, 1.2]]}
    wanted = f" (not taken: -0.8 dB against {CAUTIOUS} in its worst turn, and +0.5 is needed)"
    assert judge._why_not(noise, STRONG, judge._best(noise)) == wanted
    for other in (steady(), quieter(0.03)):  # where the one taken has least noise there is nothing to explain
        assert "not taken" not in taken(other)[1][0]


def test_one_turn_of_loud_samples_does_not_decide_alone() -> None:
    """The loud ones hold most of all energy: by the sum `max` would win by 2 dB."""
    noise = {"mse": [[100.0], [1.0], [1.0]], "max": [[60.0], [2.0], [2.0]]}
    assert judge._best(noise) == "mse"
    assert judge._best({**noise, "max": [[10.0], [2.0], [1.0]]}) == "max"  # a loss of 3 dB for 10 in another turn
    assert judge._best({"mse": [[np.inf], [1.0]], "max": [[1.0], [2.0]]}) == "max"
    assert judge._best({"mse": [[0.0], [0.0]], "max": [[0.0], [0.0]]}) == "mse"
    assert judge._best({"mse": [[1.0], [1.0]], "max": [[np.nan], [0.1]]}) == "mse"


def test_a_note_says_by_how_much_an_option_fell_short_over_all_turns() -> None:
    noise = {"mse": [[1.0], [1.0]], "max": [[0.95], [0.95]], "off": [[1.1], [1.1]]}
    assert judge._why_not(noise, "max", "mse") == " (not taken: +0.2 dB against mse in the mean, and +0.5 is needed)"
    assert judge._why_not(noise, "off", "mse") == judge._why_not(noise, "mse", "mse") == ""
    assert "+100.0 dB" in judge._why_not({"mse": [[1.0, np.inf]], "max": [[0.0, 0.0]]}, "max", "mse")


def test_a_note_says_why_a_first_option_of_less_noise_is_not_taken() -> None:
    """A rounding that fails a turn, the rivals of what is left then, and the price of headroom."""
    noise = {"gptq": [[0.1], [2.0]], "descent": [[0.5], [1.0]], "clip": [[1.0], [1.0]], "nearest": [[0.5], [0.95]]}
    assert judge._best(noise) == "descent"
    assert judge._why_not(noise, "gptq", "descent") == (
        " (not taken: a rounding that looks at weights alone is 3.2 dB better in a turn)"
    )
    assert judge._why_not(noise, "nearest", "descent") == (
        " (not taken: +0.1 dB against descent in the mean, and +0.25 is needed)"
    )
    wide = {"mse": [[1.0]] * 3, "ample": [[1.05]] * 3, "max": [[1.1]] * 3}
    assert judge._why_not(wide, "mse", judge._best(wide)) == (
        " (not taken: ample has more headroom and loses 0.2 dB, of 0.3 that it may)"
    )


def test_the_order_of_the_samples_changes_nothing() -> None:
    assert taken(steady(), shift="auto") == taken(steady()[::-1], shift="auto")


@pytest.mark.parametrize("settings", [{}, {"scheme": "int4"}, {"scheme": "w4a8", "rounding": "auto"}])
def test_nothing_is_compared_where_there_is_no_ground_to(settings: dict[str, object]) -> None:
    for data, why in ((None, "only a table"), (steady(1), "one calibration sample")):
        found, notes = taken(data, **settings)
        assert found == Settings.from_mapping({"rounding": "nearest", "shift": True, **settings}).settled
        assert len(notes) == 1 and why in notes[0]


def test_a_large_model_is_not_quantized_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "is_large", lambda tensors: True)
    settings, notes = taken(steady())
    assert settings.equalize == CAUTIOUS
    assert "size" in notes[0]


def test_what_is_asked_for_is_not_judged() -> None:
    settings = Settings(calibrator="entropy", equalize="lae", rounding="gptq", shift=True)
    plan = placement.plan(outliers(), settings)
    assert judged(outliers(), plan, steady()) == (plan, ())


@pytest.mark.parametrize(("grows", "taken"), [(True, "max"), (False, "mse")])
def test_the_whole_range_is_taken_where_what_is_held_out_goes_beyond_the_others(grows: bool, taken: str) -> None:
    """Heavy tails, which least error clips; of samples that grow the largest is held out with what it clips."""
    model = build([node("MatMul", "x w", "y")], {"x": (64, 32)}, {"w": normal(32, 16)})
    rng = np.random.default_rng(3)
    data = []
    for i in range(12):
        tail = rng.standard_t(3, size=(64, 32)) if not grows else rng.normal(size=(64, 32)) * 1.3**i
        data.append({"x": tail.astype(np.float32)})
    settings = Settings(equalize="none", rounding="nearest", shift=False, bias_correction="off")
    made = quantize(model, data, settings=settings)
    assert made.plan.settings.calibrator == taken


def fitted() -> tuple[Model, list[graphs.Sample]]:
    """Products whose samples lie in a few directions each, other ones in every sample."""
    model = build([node("MatMul", "x w", "y")], {"x": (4, 64)}, {"w": normal(64, 32)})
    rng = np.random.default_rng(5)
    return model, [{"x": rng.standard_normal((4, 64)).astype(np.float32)} for _ in range(6)]


def test_a_rounding_that_loses_to_a_simpler_one_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without shrinkage, four rows of 64 columns a sample tell the codes nothing of the other samples."""
    from qdq.measure import second_moments

    monkeypatch.setattr(second_moments, "shrunk", lambda moment: moment.sums)
    model, data = fitted()
    settings, notes = taken(data, model, scheme="int4", rounding="auto", equalize="none")
    assert settings.rounding in ("clip", "nearest")
    assert "descent" in notes[0] and "dB" in notes[0]


def evenly(inputs: int = 128) -> Model:
    """Two products whose weights are uniform: longer blocks are worth their bits, and shorter ones 1 dB better."""
    rng = np.random.default_rng(0)
    w, v = (rng.uniform(-1, 1, size=(inputs, inputs)).astype(np.float32) for _ in range(2))
    return build(
        [node("MatMul", "x w", "h", "first"), node("MatMul", "h v", "y", "second")],
        {"x": (16, inputs)},
        {"w": w, "v": v},
    )


PLAIN_BLOCKS = {"rounding": "clip", "equalize": "none", "calibrator": "mse"}


@pytest.mark.parametrize("scheme", ["int4", "w4a8"])
def test_the_shortest_block_is_taken_where_held_out_samples_gain_by_it(scheme: str) -> None:
    model = evenly()
    settings = Settings.from_mapping({"scheme": scheme, "shift": True, **PLAIN_BLOCKS})
    plan = placement.plan(model, settings)
    assert {p.spec.block for p in plan.weights} == {128}
    chosen, (note,) = judged(model, plan, graphs.samples(model, 4))
    assert chosen.settings.block == 16 and {p.spec.block for p in chosen.weights} == {16}
    assert note.startswith("block: took 16; ") and ": worth " in note and ", 16 " in note
    assert judged(model, chosen, graphs.samples(model, 4)) == (chosen, ())
    asked = placement.plan(model, Settings.from_mapping({**settings.to_mapping(), "block": "worth"}))
    assert judged(model, asked, graphs.samples(model, 4)) == (asked, ())
    alone, notes = judged(model, plan, None)
    assert alone.points == plan.points and alone.settings.block == "worth" and "block worth" in notes[0]


def test_a_block_that_gains_nothing_is_not_taken_and_an_edited_one_stays() -> None:
    model = evenly()
    plan = placement.plan(model, Settings.from_mapping({"scheme": "int4", **PLAIN_BLOCKS}))
    edited = replace(
        plan, points=(replace(plan.points[0], spec=replace(plan.points[0].spec, block=64)), *plan.points[1:])
    )
    chosen, _ = judged(model, edited, graphs.samples(model, 4))
    assert [p.spec.block for p in chosen.weights] == [64, 16]
    grid = {name: np.round(model.array(name) * 7) for name in "wv"}  # every block holds these exactly
    exact = build(
        [*model.graph.node], {"x": (16, 128)}, {n: np.where(np.arange(128) % 16, a, 7) for n, a in grid.items()}
    )
    plan = placement.plan(exact, plan.settings)
    chosen, _ = judged(exact, plan, graphs.samples(exact, 4))
    assert chosen.settings.block == "worth" and chosen.points == plan.points


def skewed() -> Model:
    """x -> Conv -> y whose shifted sum is inexact where it counts: a steep curve at zero."""
    nodes = [
        node("Conv", "x w", "a"),
        node("Mul", "a large", "b"),
        node("Tanh", "b", "t"),
        node("Conv", "t v", "y"),
    ]
    constants = {"w": normal(4, 4, 3, 3), "v": normal(4, 4, 1, 1), "large": np.float32(1e9)}
    return build(nodes, {"x": (1, 4, 8, 8)}, constants)


def test_a_shift_that_loses_is_not_taken_and_both_figures_are_said() -> None:
    """Half of each input is zero, whose products a shift leaves at 1e-7: the curve makes them whole."""
    data = [{"x": np.where(np.arange(8) < 5, 0, np.abs(s["x"]))} for s in graphs.samples(skewed(), 4)]
    made = quantize(skewed(), data)
    assert not made.plan.settings.shift
    assert not any(point.spec.shift for point in made.plan.points)
    assert not any(p.zero_point for p in made.solution.activations.values())
    assert any(n.startswith("shift: took off") and ", off " in n for n in made.solution.notes)
    asked = quantize(skewed(), data, settings=Settings(shift=True))
    assert any(p.zero_point for p in asked.solution.activations.values())


@pytest.mark.parametrize("calibrator", ["mse", "auto"])
def test_a_quantized_model_says_what_was_taken_and_its_plan_holds_it(calibrator: str) -> None:
    made = quantize(outliers(), steady(), settings=Settings(calibrator=calibrator))
    assert made.plan.settings.equalize == STRONG
    assert any(n.startswith(f"equalize: took {STRONG};") for n in made.solution.notes)
    again = quantize(outliers(), steady(), plan=made.plan)
    assert again.model.proto == made.model.proto


def hidden(what: float) -> Model:
    """A product whose data hold NaN in the rows of no valid key, as attention does, which a Where hides behind it."""
    nodes = [
        node("MatMul", "x w", "s"),
        node("Where", "mask s low", "m"),
        node("Softmax", "m", "p"),
        node("MatMul", "p v", "o"),
        node("Where", "valid o zero", "y"),
    ]
    mask = np.arange(32) < (np.arange(4)[:, None] > 0) * 20  # the first row has no key
    constants = {
        "w": normal(16, 32),
        "v": normal(32, 16),
        "mask": mask,
        "valid": np.arange(4)[:, None] > 0,
        "low": np.float32(what),
        "zero": np.float32(0),
    }
    return build(nodes, {"x": (4, 16)}, constants)


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-weight", "w4a8", "fptq", "nvfp4-weight"])
def test_every_scheme_refuses_data_that_are_not_finite_and_names_the_tensor(scheme: str) -> None:
    model = hidden(-np.inf)
    with pytest.raises(InputError, match="makes tensor 'p' of the float model hold"):
        quantize(model, graphs.samples(model, 4), settings=Settings(scheme=scheme))
    model = hidden(-1e9)
    quantize(model, graphs.samples(model, 4), settings=Settings(scheme=scheme))


def added() -> tuple[Model, list[graphs.Sample]]:
    """A mask that is an input, with -inf where no key is."""
    nodes = [node("MatMul", "x w", "s"), node("Add", "s mask", "a"), node("Softmax", "a", "p")]
    constants = {"w": normal(16, 8), "v": normal(8, 8)}
    model = build([*nodes, node("MatMul", "p v", "y")], {"x": (4, 16), "mask": (4, 8)}, constants)
    low = np.where(np.arange(8) < 5, 0, -np.inf).astype(np.float32) * np.ones((4, 1), np.float32)
    return model, [{**s, "mask": low} for s in graphs.samples(model, 4)]


def test_an_input_that_nothing_quantizes_may_hold_minus_infinity() -> None:
    model, data = added()
    made = quantize(model, data)
    assert len(made.plan.quantized_nodes) == 2
    assert np.isfinite(graphs.run(made.model, data[:1])[0]["y"]).all()
    with pytest.raises(InputError, match=r"makes tensor '[xp]' of the float model hold"):
        quantize(model, [{**s, "x": np.where(s["x"] > 2, -np.inf, s["x"]).astype(np.float32)} for s in data])


def test_outputs_that_are_not_finite_in_the_float_model_are_not_compared() -> None:
    """The logarithm of a masked probability is -inf in both models."""
    y = np.array([1.0, -np.inf, np.nan], np.float32)
    assert energies({"y": y}, {"y": np.array([1.5, -np.inf, 0], np.float32)}) == (1.0, 0.25)
    assert energies({"y": y}, {"y": np.array([np.nan, 0, 0], np.float32)}) == (1.0, np.inf)


NUMBERS, LABELS, TEXTS = ("y",), ("best",), ("text", "both")


@pytest.mark.parametrize("ends", [NUMBERS + LABELS + TEXTS + ("found",), LABELS, ("found",), TEXTS])
def test_outputs_are_judged_by_floats_else_by_other_numbers(ends: tuple[str, ...]) -> None:
    """Labels, indices whose number depends on values, texts and sequences stand beside scores, or alone."""
    nodes = [
        node("MatMul", "x w", "y"),
        node("ArgMax", "y", "best", axis=1),
        node("Relu", "y", "r"),
        node("NonZero", "r", "found"),
        node("Cast", "best", "text", to=onnx.TensorProto.STRING),
        node("SequenceConstruct", "y y", "both"),
    ]
    proto = assemble(nodes, {"x": (64, 32)}, {}, [constant("w", normal(32, 16))])
    kinds = {"best": onnx.TensorProto.INT64, "found": onnx.TensorProto.INT64, "text": onnx.TensorProto.STRING}
    for name in ends:
        make = helper.make_tensor_sequence_value_info if name == "both" else helper.make_tensor_value_info
        proto.graph.output.append(make(name, kinds.get(name, onnx.TensorProto.FLOAT), None))
    model = prepare(Model(proto=proto, directory=Path(), sha256="m"))
    data = graphs.samples(model, 4)
    first = next((kind for kind in (NUMBERS, LABELS, ("found",)) if set(kind) <= set(ends)), ())
    assert comparable(model) == (["r"] if first == ("found",) else list(first))  # what NonZero reads has one size
    made = quantize(model, data, settings=Settings())
    assert any("nothing compared: no output holds numbers" in n for n in made.solution.notes) is (ends == TEXTS)
    assert not any("of no use" in n for n in made.solution.notes)


def test_an_output_of_another_shape_counts_as_zeros() -> None:
    assert energies({"y": np.float32([3, 4])}, {"y": np.float32([3, 4, 5])}) == (25.0, 25.0)


def test_outputs_that_are_empty_on_every_sample_decide_nothing() -> None:
    nodes = [node("MatMul", "x w", "y"), node("Mul", "y zero", "z"), node("NonZero", "z", "found")]
    stored = [constant("w", normal(32, 16)), constant("zero", np.zeros(1, np.float32))]
    proto = assemble(nodes, {"x": (64, 32)}, {"found": (2, "n")}, stored)
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    model = prepare(Model(proto=proto, directory=Path(), sha256="m"))
    made = quantize(model, graphs.samples(model, 4), settings=Settings())
    assert not any(": took " in note for note in made.solution.notes)
