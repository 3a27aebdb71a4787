"""Profiles: every compiler has one, each fact has a source, and names lead to them."""

from __future__ import annotations

import dataclasses

import pytest

from engines.backends import doctor
from engines.backends.backend import backend_named, backends, members
from engines.backends.profile import Fact, Profile, profile_named, profile_of, profiles
from engines.core.errors import EngineError, UnsupportedTargetError


@pytest.mark.parametrize("profile", profiles().values(), ids=list(profiles()))
class TestEveryProfile:
    def test_is_described(self, profile: Profile) -> None:
        backend = backend_named(profile.backend)
        assert profile_named(profile.key) is profile and profile.name == backend.compiler
        assert profile.title.startswith(backend.title) and set(profile.targets) <= set(backend.targets)
        assert set(profile.blocks) <= set(profile.formats)
        assert all(lengths == tuple(sorted(lengths, reverse=True)) for lengths in profile.blocks.values())

    def test_every_fact_has_a_source_and_words(self, profile: Profile) -> None:
        assert len(profile.facts) > 10
        assert all(fact.source and fact.says for fact in profile.facts.values())
        for fact in profile.facts.values():  # what is not known is not acted on
            assert bool(fact) is (fact.holds is True)

    def test_formats_need_their_generation(self, profile: Profile) -> None:
        profile.require_formats(["int8", "int4"], ["sm80", "8.9"])
        profile.require_formats(["fp8"], ["sm89"])
        with pytest.raises(UnsupportedTargetError, match=r"8\.6 cannot compile fp8: it needs sm89 or newer"):
            profile.require_formats(["fp8"], ["8.6", "sm89"])
        with pytest.raises(UnsupportedTargetError, match=f"{profile.title} has no int3: choose"):
            profile.require_formats(["int3"], ["sm89"])


def test_a_file_of_profiles_is_no_second_backend() -> None:
    names = [backend.name for backend in members("BACKEND")]
    assert len(names) == len(set(names)) == len(backends())


def test_every_backend_has_a_profile() -> None:
    assert {profile_of(name).backend for name in backends()} == set(backends())


@pytest.mark.parametrize(
    ("text", "key"),
    [("rtx", "rtx"), ("tensorrt", "tensorrt:11"), ("tensorrt:10.3", "tensorrt:10.3"), ("tensorrt:11", "tensorrt:11")],
)
def test_a_name_without_a_version_is_the_usual_one(text: str, key: str) -> None:
    assert profile_named(text).key == key


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensort", "Did you mean 'tensorrt'"),
        ("trt", "Did you mean 'tensorrt'"),
        ("TRT:10.16", "Did you mean 'tensorrt:10.16'"),
        ("TensorRT", "Did you mean 'tensorrt'"),
        ("TensorRT-RTX", "Did you mean 'rtx'"),
        ("RTX", "Did you mean 'rtx'"),
        ("tensorrt:10.4", "Did you mean 'tensorrt:10.3'|Did you mean 'tensorrt:10.16'"),
        ("trt", "there are rtx, tensorrt, tensorrt:11"),
        ("dla", "DLA is no compiler here.*--compiler tensorrt"),
        ("DLA:0", "DLA is no compiler here"),
    ],
)
def test_another_name_is_refused_with_the_nearest_or_the_reason(text: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        profile_named(text)


@pytest.mark.parametrize("compiler", ["rtx", "tensorrt"])
def test_dla_is_no_target_and_the_reason_is_said(compiler: str) -> None:
    with pytest.raises(UnsupportedTargetError, match=r"DLA is no compiler here.*for the GPU of that device"):
        profile_named(compiler).require_target("DLA0")


def test_a_version_without_a_target_or_format_names_those_that_have_it() -> None:
    old = profile_named("tensorrt:10.3")
    with pytest.raises(UnsupportedTargetError, match=r"10\.3 has no target 'sm120'.*needs TensorRT 11 \(--compiler"):
        old.require_target("sm120")
    with pytest.raises(UnsupportedTargetError, match=r"10\.3 has no nvfp4: take --compiler .*tensorrt:10\.16"):
        old.require_formats(["nvfp4"], ["sm90"])
    profile_named("tensorrt").require_formats(["nvfp4"], ["sm100"])
    with pytest.raises(UnsupportedTargetError, match="it needs sm120 or newer"):
        profile_named("rtx").require_formats(["nvfp4"], ["sm89"])


def test_tensorrt_assumes_no_fusion_that_nobody_documents() -> None:
    rtx, tensorrt = profile_named("rtx"), profile_named("tensorrt")
    assert rtx.shift and rtx.hoist and rtx.padding and not rtx.integer_output
    assert tensorrt.integer_output and not (tensorrt.shift or tensorrt.hoist or tensorrt.padding)
    assert tensorrt.shift.holds is None and tensorrt.blocks["int4"] == (128, 64)
    old = profile_named("tensorrt:10.3")
    assert "nvfp4" not in old.formats and "sm120" not in old.targets and "sm87" in old.targets


@pytest.mark.parametrize(
    ("key", "version", "same"),
    [
        ("tensorrt:11", "11.4.0.106", True),
        ("tensorrt:11", "10.16.1.11", False),
        ("tensorrt:10.16", "10.16.1.11", True),
        ("tensorrt:10.3", "10.30.0.1", False),
        ("rtx", "1.7.1.116", True),
    ],
)
def test_layers_are_of_the_compiler_or_of_another(key: str, version: str, same: bool) -> None:
    profile = profile_named(key)
    assert profile.same_compiler(profile.backend, version) is same
    assert not profile.same_compiler("another", version)


def test_a_fact_that_does_not_hold_or_is_not_known_counts_as_none() -> None:
    fact = Fact(holds=True, says="it does", source="measured")
    assert fact and not dataclasses.replace(fact, holds=None) and not dataclasses.replace(fact, holds=False)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("11.4.0.106", "--compiler tensorrt:11"),
        ("10.16.1.11", "--compiler tensorrt:10.16"),
        ("9.3.0.1", "no profile is of this version; there are tensorrt:11, tensorrt:10.16, tensorrt:10.3"),
        ("", "not installed (compile on the GPU: --compiler tensorrt:11 or tensorrt:10.16 or tensorrt:10.3)"),
    ],
)
def test_the_doctor_names_the_version_that_is_here(monkeypatch: pytest.MonkeyPatch, version: str, said: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda runtime: version)
    row = next(row for row in doctor.diagnose() if row.name == backend_named("trt").runtime)
    assert said in row.detail
    able = next(row for row in doctor.diagnose() if row.name == "compile with TensorRT")
    assert able.ok or "writes all but the engine" in able.fix
