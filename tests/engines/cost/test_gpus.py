"""The table of GPUs against a formula, and a user's own GPU from a recipe."""

from __future__ import annotations

import math
import pickle
import re

import pytest

from engines.backends.backend import backends
from engines.core.errors import EngineError
from engines.cost.datasheets import HALVED, OPERATIONS, ROWS, TENSORRT_ONLY, USUAL, Datasheet
from engines.cost.gpus import GPUS, Gpu, Measured, gpu_named, usual_gpu

USERS = {
    "name": "mine",
    "target": "sm86",
    "bandwidth_gb_s": 448,
    "tera_ops": {"float32": 20.3, "float16": 40.6, "int8": 162.6},
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_rate_is_sms_times_clock_times_operations(row: Datasheet) -> None:
    full = row.tera_ops["float16"] == row.tera_ops["float16_accumulating"]
    for kind, rate in row.tera_ops.items():
        cores = row.target == "sm75" and kind in ("float32", "bfloat16")
        share = 0.5 if kind in HALVED and not full and not cores else 1.0
        made = row.sms * row.boost_mhz * OPERATIONS[row.target][kind] * share / 1e6
        assert rate == pytest.approx(made, rel=0.03), kind


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_plausible_and_says_where_it_is_from(row: Datasheet) -> None:
    assert row.base_mhz <= row.boost_mhz and 0.5 < row.l2_mb < 200 and 50 < row.bandwidth_gb_s < 10000
    assert re.search(r"\(20[12]\d\)|product page", row.source)
    assert GPUS[row.name].tera_ops["float16"] == row.tera_ops["float16"]


def test_every_target_that_can_be_named_has_a_gpu() -> None:
    targets = {target for backend in backends().values() for target in backend.targets}
    assert targets == set(USUAL) and all(GPUS[name].target == target for target, name in USUAL.items())
    rtx = set(backends()["rtx"].targets)
    assert set(TENSORRT_ONLY) == targets - rtx
    assert {gpu.tensorrt_only for gpu in GPUS.values() if gpu.target in rtx} == {False}
    assert usual_gpu("sm42") is None


def test_geforce_products_accumulate_in_float16_unless_told_otherwise() -> None:
    geforce = gpu_named("rtx4090")
    other = geforce.other_accumulation()
    assert other is not None and (geforce.peak("float16"), other.peak("float16")) == (330.3e6, 165.2e6)
    assert other.other_accumulation() == geforce and other.peak("int8") == geforce.peak("int8")
    assert gpu_named("l4").other_accumulation() is None
    assert any("accumulate in FP16" in line for line in geforce.notes) and gpu_named("l4").notes == ()


def test_sm75_is_called_a_float_target() -> None:
    assert "float target" in gpu_named("t4").notes[0] and "TensorRT does" in gpu_named("orin-nx").notes[0]


def test_a_type_without_a_rate_runs_in_the_float_type_that_replaces_it() -> None:
    own = Gpu.from_mapping(USERS)
    assert own.peak("fp8") == own.peak("int4") == 40.6e6 and own.peak("bfloat16") == own.peak("int32") == 20.3e6


def test_names_are_read_as_drivers_write_them() -> None:
    assert gpu_named("RTX 4090") is GPUS["rtx4090"] and {g.name for g in GPUS.values()} == GPUS.keys()
    assert gpu_named("NVIDIA GeForce RTX 4060 Laptop GPU").name == "rtx4060-laptop"
    assert gpu_named("Tesla T4").name == "t4" and gpu_named("a100_80GB").name == "a100-80gb"


def test_what_is_not_given_comes_from_the_nearest_row_of_the_target() -> None:
    own = Gpu.from_mapping(USERS)  # the rates and the bandwidth of an RTX 3070
    row = gpu_named("rtx3070")
    assert (own.sms, own.boost_mhz, own.base_mhz, own.l2_mb) == (46, row.boost_mhz, row.base_mhz, 4)
    assert own.tera_ops["float16_accumulating"] == pytest.approx(81.3) and own.watts is None
    half = Gpu.from_mapping({**USERS, "tera_ops": {"float32": 10.15, "float16": 20.3, "int8": 81.3}})
    assert half.sms == round(half.tera_ops["float16"] / half.boost_mhz * 1e6 / 512)


def test_a_gpu_like_another() -> None:
    row = gpu_named("rtx4090")
    own = Gpu.from_mapping({"like": "rtx4090", "name": "half", "sms": 64, "boost_mhz": 1260, "bandwidth_gb_s": 500})
    assert own.peak("int8") == pytest.approx(row.peak("int8") / 4) and own.base_mhz == pytest.approx(2235 / 2)
    assert (own.name, own.target, own.l2_mb, own.bandwidth_gb_s) == ("half", "sm89", 72, 500)
    assert Gpu.from_mapping({"like": "rtx4090", "tera_ops": {"int8": 600}}).peak("int8") == 600e6


def test_the_former_key_of_the_start_is_read() -> None:
    own = Gpu.from_mapping({**USERS, "launch_us": 3, "measured": {"factor": 1.25}})
    assert own.measured == Measured(start_us=3.0, factor=1.25)


@pytest.mark.parametrize("name", ["rtx3090", "t4"])
def test_plain_values_and_pickles_give_the_same_gpu(name: str) -> None:
    measured = Measured(start_us=2.5, tera_ops={"float16": 100.0}, boost_tera_ops={"int8": 200.0}, l2_gb_s=2000.0)
    own = Gpu.from_mapping({**gpu_named(name).to_mapping(), "measured": measured.to_mapping()})
    assert own.measured == measured and Gpu.from_mapping(own.to_mapping()) == own
    assert pickle.loads(pickle.dumps(own)) == own and hash(own) == hash(pickle.loads(pickle.dumps(own)))


def test_a_start_of_zero_stays_measured() -> None:
    own = Gpu.from_mapping({"like": "l4", "measured": {"start_us": 0, "product_start_us": 0}})
    assert own.measured == Measured(start_us=0.0, product_start_us=0.0)
    assert pickle.loads(pickle.dumps(own)) == own == Gpu.from_mapping(own.to_mapping())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"name": "x", "bandwith_gb_s": 1}, "Did you mean 'bandwidth_gb_s'"),
        ({"name": "x", "target": "sm89"}, "'bandwidth_gb_s' is missing.*like"),
        ({**USERS, "target": "sm42"}, "no GPU of target 'sm42'.*Give sms, boost_mhz"),
        ({**USERS, "tera_ops": {"int8": 5}}, "float16 is missing too"),
        ({**USERS, "tera_ops": {"float32": 1, "float16": 2, "half": 2}}, "unknown data type 'half'"),
        ({**USERS, "tera_ops": {"float16": 2}}, "lacks float32"),
        ({**USERS, "tera_ops": 5}, "tera_ops is 5"),
        ({**USERS, "bandwidth_gb_s": 0}, "must be above 0"),
        ({**USERS, "bandwidth_gb_s": "fast"}, "'fast', which is no number"),
        ({**USERS, "l2_mb": True}, "l2_mb is True"),
        ({**USERS, "launch_us": -1}, "0 or more"),
        ({**USERS, "accumulation": "float64"}, "must be float16 or float32"),
        ({**USERS, "base_mhz": 3000}, "above boost_mhz"),
        ({"like": "rtx409"}, "Unknown GPU 'rtx409'.*Did you mean 'rtx4090'"),
        ({"like": "rtx4090", "sms": 0}, "sms is 0.*above 0"),
        ({"like": "rtx4090", "boost_mhz": math.nan}, "boost_mhz is nan.*above 0"),
        ({"like": "rtx4090", "target": "sm86"}, "has the target sm89"),
        ({**USERS, "measured": {"start": 1}}, "Did you mean 'start_us'"),
        ({**USERS, "measured": 3}, "measured is 3"),
        ({**USERS, "measured": {"factor": 0}}, "factor is 0.*above 0"),
    ],
)
def test_bad_values_say_what_to_do(values: dict[str, object], text: str) -> None:
    with pytest.raises(EngineError) as caught:
        Gpu.from_mapping(values)
    assert re.search(text, str(caught.value)), caught.value
