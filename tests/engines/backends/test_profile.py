"""Profiles: every compiler has one, each fact has a source, and names lead to them."""

from __future__ import annotations

import dataclasses

import pytest

from engines.backends.backend import backend_named, backends
from engines.backends.profile import Fact, Profile, profile_named, profile_of, profiles
from engines.core.errors import EngineError


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
        assert profile.runs("int8", ["sm86", "sm89"]) and not profile.runs("fp8", ["sm86", "sm89"])
        assert profile.runs("fp8", ["sm89"]) and not profile.runs("int3", ["sm89"])


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
        ("tensorrt:10.4", "Did you mean 'tensorrt:10.3'|Did you mean 'tensorrt:10.16'"),
        ("trt", "there are rtx, tensorrt, tensorrt:11"),
        ("dla", "DLA is no compiler here.*--compiler tensorrt"),
        ("DLA:0", "DLA is no compiler here"),
    ],
)
def test_another_name_is_refused_with_the_nearest_or_the_reason(text: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        profile_named(text)


def test_tensorrt_assumes_no_fusion_that_nobody_documents() -> None:
    rtx, tensorrt = profile_named("rtx"), profile_named("tensorrt")
    assert rtx.shift and rtx.hoist and rtx.fours and not rtx.integer_output
    assert tensorrt.integer_output and not (tensorrt.shift or tensorrt.hoist or tensorrt.fours)
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
