"""Every rule finds its broken models, and says of each what the real compiler does with it, before and after repair."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from broken_models import BROKEN, FLOAT, HALF, Broken, Net, act, conv, data, full, kernel, matrix, product
from click.testing import CliRunner
from onnx import TensorProto
from places import ROOT

from engines.backends import rtx
from engines.core import onnx_runtime as ort
from engines.core.errors import BuildError
from engines.verify.audit import Audit, audit
from qdq.cli.lint import lint_command
from qdq.core.errors import InputError
from qdq.lint.lint import RULES, Finding, lint
from qdq.lint.repair.repair import Repaired, repair
from qdq.lint.rule import Rule
from qdq.model.model import Model

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
EFFECTS = {rule.name: rule.effect for rule in RULES}
ALL = pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))


def of(effect: str) -> pytest.MarkDecorator:
    """Every broken model whose rule has an effect."""
    chosen = {name: broken for name, broken in BROKEN.items() if EFFECTS[broken.rule] == effect}
    return pytest.mark.parametrize("broken", chosen.values(), ids=list(chosen))


def model_of(proto: onnx.ModelProto) -> Model:
    return Model(proto=proto, directory=Path(), sha256="")


def found_in(proto: onnx.ModelProto) -> list[Finding]:
    return lint(model_of(proto))


def repaired(proto: onnx.ModelProto) -> Repaired:
    return repair(model_of(proto))


def compiled(proto: onnx.ModelProto) -> Audit:
    return audit(proto, rtx.build(proto, targets=["sm89"]).table)


def rounds(proto: onnx.ModelProto) -> int:
    """How often the kernels of an engine round: once per quantizer that was not optimized away."""
    return sum(layer.name.count("Roun") for layer in rtx.build(proto, targets=["sm89"]).table.layers)


def sqnr_db(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> float:
    session = ort.session(reference)
    shape, kind = session.get_inputs()[0].shape, session.get_inputs()[0].type
    x = np.random.default_rng(3).normal(size=shape).astype(np.float16 if "16" in kind else np.float32)
    a, b = (next(iter(next(ort.run(m, [{"x": x}])).values())).astype(np.float64) for m in (reference, candidate))
    return float(10 * np.log10((a**2).sum() / max(((a - b) ** 2).sum(), 1e-300)))


@ALL
def test_a_broken_model_is_found_by_its_rule_at_its_node_and_by_no_other(broken: Broken) -> None:
    found = found_in(broken.build())
    assert (broken.rule, broken.node) in [(f.rule, f.node) for f in found]
    assert {f.rule for f in found} == {broken.rule}
    for finding in found:
        assert finding.severity == ("error" if finding.effect in ("refused", "crash", "wrong") else "warning")
        assert finding.message and finding.tensorrt and finding.remedy


def test_there_are_sixty_broken_models_and_one_for_every_rule() -> None:
    assert len(BROKEN) >= 60
    assert {b.rule for b in BROKEN.values()} == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_says_what_it_finds_and_whether_it_is_repaired(rule: Rule) -> None:
    said = rule.find.__doc__ or ""
    assert said.endswith(".") and rule.tensorrt and rule.remedy
    fixed = {b.fixed for b in BROKEN.values() if b.rule == rule.name}
    assert ("Repaired" in said) == (True in fixed)


@ALL
def test_repair_leaves_nothing_or_says_what(broken: Broken) -> None:
    proto = broken.build()
    before = proto.SerializeToString(deterministic=True)
    done = repaired(proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert (not done.left) == broken.fixed
    assert any(broken.rule in c.rules for c in done.changes) == broken.fixed
    assert done.model.proto.graph.input == proto.graph.input
    assert done.model.proto.graph.output == proto.graph.output
    if broken.fixed:
        onnx.checker.check_model(done.model.proto)
        assert repair(done.model).changes == ()
    else:
        assert done.left[0].rule == broken.rule


@needs_rtx
@of("refused")
def test_what_is_said_to_be_refused_is_refused_and_accepted_once_repaired(broken: Broken) -> None:
    proto = broken.build()
    with pytest.raises(BuildError) as error:
        rtx.build(proto, targets=["sm89"])
    said = next(rule.tensorrt for rule in RULES if rule.name == broken.rule)
    met = str(error.value).replace("it knows no such operator", "false")  # which is all that the parser says
    assert any(part.strip(" ()")[:40] in met for part in said.replace("(stored UINT8:", "/").split("/")), said
    if broken.fixed:
        audited = compiled(repaired(proto).model.proto)
        assert not audited.missed and not audited.suspect


@needs_rtx
@pytest.mark.parametrize("rule", ["unsigned", "no-zero-point", "block-product"])
def test_what_is_said_to_be_wrong_builds_and_is_suspect_until_repaired(rule: str) -> None:
    for broken in [b for b in BROKEN.values() if b.rule == rule]:
        assert compiled(broken.build()).suspect
        assert not compiled(repaired(broken.build()).model.proto).suspect


@needs_rtx
@pytest.mark.parametrize("value", [1e-40, np.inf])
def test_a_scale_outside_the_normal_numbers_builds_though_its_reciprocal_is_no_factor(value: float) -> None:
    proto = conv(a=act(value))
    layers = rtx.build(proto, targets=["sm89"]).table.layers
    assert layers[0].name.startswith("__myl_MulMinMaxRoun")  # x times 1 / scale, in the type of the scale
    with np.errstate(over="ignore"):
        assert float(np.float32(1) / np.float32(value)) in (0.0, np.inf)


@needs_rtx
def test_a_half_scale_is_inverted_in_half() -> None:
    constants = rtx.build(product(elem=HALF), targets=["sm89"]).table.layers[0].constants
    assert [c.dtype for c in constants] == ["float16"]
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(1) / np.float16(6e-8))


@needs_rtx
def test_a_computed_scale_of_a_convolution_ends_the_compilers_process(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    onnx.save(BROKEN["computed scale, conv"].build(), path)
    script = "import sys; from engines.backends import rtx; rtx.build(sys.argv[1]); print('built')"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode != 0 and "built" not in done.stdout


@needs_rtx
@of("float")
def test_what_is_said_to_run_in_float_does_until_repaired(broken: Broken) -> None:
    proto = broken.build()
    assert [n.consumed for n in compiled(proto).missed] == ["float32"]
    if broken.fixed:
        audited = compiled(repaired(proto).model.proto)
        assert not audited.missed and audited.int8_share == 1


@needs_rtx
@of("kernel")
def test_what_is_said_to_cost_a_kernel_does(broken: Broken) -> None:
    proto = broken.build()
    better = repaired(proto).model.proto if broken.fixed else conv()
    assert compiled(better).kernels == compiled(proto).kernels - 1


@needs_rtx
@of("rounding")
def test_a_needless_quantizer_rounds_once_more_and_saves_no_kernel(broken: Broken) -> None:
    proto = broken.build()
    fixed = repaired(proto).model.proto
    assert rounds(fixed) == rounds(proto) - 1
    assert compiled(fixed).kernels <= compiled(proto).kernels


@needs_rtx
def test_a_stored_weight_is_smaller_and_gives_the_same_kernels() -> None:
    for broken in [b for b in BROKEN.values() if b.rule == "float-weight"]:
        proto = broken.build()
        fixed = repaired(proto).model.proto
        assert fixed.ByteSize() < 0.35 * proto.ByteSize()  # a quarter, and the scales and names
        assert compiled(fixed).kernels == compiled(proto).kernels
        assert sqnr_db(proto, fixed) > 120  # the same codes: only the order of float sums may differ


@needs_rtx
def test_a_written_axis_changes_nothing_on_tensorrt_rtx() -> None:
    proto = BROKEN["default axis"].build()
    fixed = repaired(proto).model.proto
    assert compiled(fixed) == compiled(proto)


@pytest.mark.parametrize("proto", [conv(), product(), product(elem=HALF), conv(opset=13), conv(data, kernel(0.01))])
def test_a_good_model_has_no_findings_and_is_returned_as_it_is(proto: onnx.ModelProto) -> None:
    model = model_of(proto)
    assert lint(model) == []
    assert repair(model).model is model


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("zero", [-128, -100, 5])
def test_an_asymmetric_activation_keeps_its_codes(opset: int, zero: int) -> None:
    for proto in (conv(a=act(zero=zero), opset=opset), product(a=act(zero=zero), opset=opset)):
        # the same codes but where float rounding meets a tie; one code in 16384 off gives about 80 dB
        assert sqnr_db(proto, repaired(proto).model.proto) > 80


def test_an_asymmetric_activation_that_is_also_read_elsewhere_keeps_its_values() -> None:
    g = Net()
    x = g.qdq("x", "a", 0.02, 100, np.uint8)
    y = g.op("Conv", [x, kernel()(g)], "conv", pads=[1] * 4)
    proto = g.done(g.op("Add", [y, x], "add"), [1, 16, 8, 8], [1, 16, 8, 8])
    done = repaired(proto)
    assert not done.left
    assert sqnr_db(proto, done.model.proto) > 80


def test_codes_of_sixteen_bits_keep_the_relu_that_their_zero_point_was() -> None:
    proto = conv(a=act(0.0001, dtype=np.uint16))
    # 8 bits for a range of 6.55: steps of 0.0516, of uniform error step / sqrt(12) = 0.015 against values of about 0.6
    assert sqnr_db(proto, repaired(proto).model.proto) > 30


@pytest.mark.parametrize("zero", [-128, 20])
def test_a_float_constant_behind_an_asymmetric_quantizer_keeps_its_values(zero: int) -> None:
    g = Net()
    values = g.init("k", np.linspace(0, 2, 16, dtype=np.float32).reshape(1, 16, 1, 1) - 0.01 * (zero + 128))
    proto = g.done(g.op("Mul", ["x", g.qdq(values, "k", 0.01, zero)], "mul"), [1, 16, 8, 8], [1, 16, 8, 8])
    # steps of at most 2 / 127 once and 0.01 before: a uniform error of 0.005 against values of about 1
    assert sqnr_db(proto, repaired(proto).model.proto) > 40


@pytest.mark.parametrize("op", ["BatchNormalization", "ConvTranspose", "output"])
def test_a_removed_quantizer_that_was_a_relu_leaves_its_limits(op: str) -> None:
    """ONNX Runtime drops a Relu or Clip whose range the asymmetric quantizer behind it has."""
    g = Net()
    x = g.qdq(g.op("Conv", [data(g), kernel()(g)], "conv", pads=[1] * 4), "m", 0.04, -128)
    if op == "BatchNormalization":
        x = g.op(op, [x, *(g.init(n, np.ones(16, np.float32)) for n in ("s", "b", "mean", "var"))], "norm")
    elif op == "ConvTranspose":
        x = g.op(op, [x, kernel(name="w2", axis=1)(g)], "transposed", pads=[1] * 4)
    proto = g.done(x, [1, 16, 8, 8], [1, 16, 8, 8])
    done = repaired(proto)
    assert done.left == ()
    # only rounding is gone, in steps of 0.04 up to 10.2 of values of about 3: without the limit at 0 it is below 3 dB
    assert sqnr_db(proto, done.model.proto) > 25


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_behind_a_transpose_is_judged_by_the_axis_that_arrives(axis: int) -> None:
    g = Net()
    w = g.op("Transpose", [matrix(full([64, 128][axis]), shape=(64, 128), axis=axis)(g)], "t", perm=[1, 0])
    proto = g.done(g.op("MatMul", [data(g), w], "product"), [32, 128], [32, 64])
    assert [f.rule for f in found_in(proto)] == ([] if axis == 0 else ["weight-axis"])
    assert repaired(proto).left == ()


def test_scales_from_constant_nodes_are_constant() -> None:
    proto = conv()
    tensor = next(t for t in proto.graph.initializer if t.name == "a.scale")
    proto.graph.initializer.remove(tensor)
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["a.scale"], value=tensor))
    assert found_in(proto) == []


def test_per_row_scales_of_an_activation_are_no_fault() -> None:
    assert found_in(product(a=act(full(32, 0.02), axis=0))) == []


def test_weight_only_int4_in_blocks_is_no_fault() -> None:
    assert found_in(product(lambda g: "x", matrix(full([2, 64]), ml_dtypes.int4, axis=0, block_size=64))) == []


def test_codes_that_the_caller_feeds_are_left() -> None:
    g = Net()
    names = g.params("a", zero=0, dtype=np.uint8)
    proto = g.done(g.op("Relu", [g.op("DequantizeLinear", ["x", *names], "a.DQ")], "relu"), [4], [4])
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    assert [f.rule for f in repaired(proto).left] == ["unsigned"]


def write(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(BROKEN[name].build() if name in BROKEN else conv(), path)
    return path


@pytest.mark.parametrize(("name", "code"), [("good", 0), ("uint8 activation", 1), ("float weight", 0)])
def test_the_exit_code_is_1_for_errors_only(tmp_path: Path, name: str, code: int) -> None:
    result = CliRunner().invoke(lint_command, [str(write(tmp_path, name)), "--json"])
    assert result.exit_code == code
    shown = json.loads(result.stdout)
    assert shown["error"] == code and len(shown["findings"]) == shown["error"] + shown["warning"]


@needs_rtx
def test_fix_writes_a_model_that_compiles_and_says_how_far_it_is(tmp_path: Path) -> None:
    source, out = write(tmp_path, "uint8 zero point 128"), tmp_path / "out.onnx"
    before = source.read_bytes()
    result = CliRunner().invoke(lint_command, [str(source), "--fix", "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["proof"]["compiles"] and shown["proof"]["max_abs_error"] < 1e-4 and shown["left"] == []
    assert source.read_bytes() == before and lint(model_of(onnx.load(out))) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


@needs_rtx
@pytest.mark.parametrize("name", ["computed scale, conv", "matmul nbits"])
def test_fix_writes_nothing_that_does_not_compile(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(lint_command, [str(write(tmp_path, name)), "--fix", "-o", str(out)])
    assert result.exit_code == 1
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--fix"], ["-o", "x.onnx"]])
def test_fix_and_output_go_together(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(lint_command, [str(write(tmp_path, "good")), *arguments])
    assert isinstance(result.exception, InputError)


def test_the_model_given_is_never_replaced(tmp_path: Path) -> None:
    source = write(tmp_path, "uint8 activation")
    result = CliRunner().invoke(lint_command, [str(source), "--fix", "-o", str(source)])
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize(("elem", "scale", "found"), [(HALF, 3e-5, False), (HALF, 1.2e-5, True), (FLOAT, 2e-38, False)])
def test_a_scale_is_small_where_its_reciprocal_overflows(elem: int, scale: float, found: bool) -> None:
    dtype = np.float16 if elem == HALF else np.float32
    broken = lint(model_of(product(a=act(scale), w=matrix(full(64, 0.01, dtype)), elem=elem)))
    assert [f.rule for f in broken] == ["scale-range"] * found


def test_a_weight_may_have_a_subnormal_scale() -> None:
    """As FP16 models of small weights have, ours too; the compiler multiplies by it and divides by nothing."""
    for scale, dtype in ((3e-5, np.float16), (1e-6, np.float16), (1e-39, np.float32)):
        elem = HALF if dtype == np.float16 else FLOAT
        assert lint(model_of(product(w=matrix(full(64, scale, dtype)), elem=elem))) == []
