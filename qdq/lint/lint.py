"""What TensorRT refuses in a Q/DQ model, gets wrong, or builds and then runs in float: one rule each.

Model -> View of its quantizers -> every rule yields findings with the node and a remedy -> `lint`, in graph order.
Every rule of `RULES` was tried in tensorrt_rtx 1.7.1 (SM89), and the tests try it again; those of `by_profile` are what
a compiler's profile says. What one compiler is known to do and another is not, is found for the one alone. This module
must not change a model.

Effects: refused, crash (of the compiler's process) and wrong (results differ) are errors. float, kernel (one more),
rounding (a quantizer that no integer kernel reads), size and version are warnings.
Source of the texts: the parser's and the builder's own messages, tensorrt_rtx 1.7.1.116; for default-axis,
onnx-tensorrt's parser of 10.1 and 10.15.
"""

from __future__ import annotations

from engines.backends.backend import DEFAULT
from engines.backends.profile import Profile, profile_named, profiles
from engines.core.documents import Part
from engines.core.nodes import label
from qdq.lint import by_profile, errors, warnings
from qdq.lint.rule import Rule
from qdq.lint.view import View
from qdq.model.made_for import made_for
from qdq.model.model import Model

RULES: tuple[Rule, ...] = (*errors.RULES, *warnings.RULES)


class Finding(Part, frozen=True, kw_only=True):
    """One thing that is wrong at one node.

    Attributes:
        rule: its name; the docstring of the rule says what it finds and what `repair` does about it.
        severity: "error" (refused, crash, wrong) or "warning".
        effect: what TensorRT makes of it.
        node: name of the ONNX node.
        message: what is found there.
        tensorrt: TensorRT's own words, or what it was seen to do.
        remedy: what to do.
    """

    rule: str
    severity: str
    effect: str
    node: str
    message: str
    tensorrt: str
    remedy: str


def profile_for(model: Model, compiler: str | None = None) -> Profile:
    """The profile of a compiler; where none is given of the one that the model was made for, or the usual one.

    Raises:
        EngineError: an unknown compiler.
    """
    made = made_for(model.proto)
    return profile_named(compiler or (made if made in profiles() else DEFAULT))


def lint(model: Model, profile: Profile | None = None) -> list[Finding]:
    """Everything that the rules find in a model, in the order of its nodes, then of the rules.

    A model without quantizers has no findings. `profile` is of the compiler it is judged for, None as `profile_for`.
    """
    view = View(model, profile or profile_for(model))
    order = {id(node): i for i, node in enumerate(view.nodes)}
    rules = enumerate((*RULES, *by_profile.RULES))
    found = [(order[id(node)], i, rule, node, text) for i, rule in rules for node, text in rule.find(view)]
    return [
        Finding(
            rule=rule.name,
            severity=rule.severity,
            effect=rule.effect,
            node=label(node),
            message=text,
            tensorrt=rule.tensorrt,
            remedy=rule.remedy,
        )
        for _, _, rule, node, text in sorted(found, key=lambda row: row[:2])
    ]
