"""The network in order, and where its time goes: rows of the page.

report (audit, details) + plan -> a row for each node: type, time, error, why float -> a row for each kernel.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from engines.backends.layers import SYNCHRONIZATION
from qdq.deploy.page import words
from qdq.deploy.page.folder import Run
from qdq.deploy.page.svg import bar, stack
from qdq.deploy.report.details import Details, KernelRow

SHOWN = 24  # kernels, those that take longest; the others are one row


def nodes(run: Run) -> list[dict[str, Any]]:
    """A row for each node, in the order of the network.

    Keys: `place` from 1, `node`, `op`, `type` in words, `kind` ('low', 'float' or 'other'), `multiplies`, `us` of the
    kernel that it leads (None: it is in that of `inside`, or in none), `inside`, `macs`, `data_db` and `weight_db`
    (lowest of what it reads; None: not quantized, or not measured), `why`.
    """
    details, report = run.report.details, run.report
    if details is None:
        return []
    audited = {row.node: row for row in report.audit.nodes} if report.audit else {}
    skips = {s.node: s.reason for s in run.plan.skips} if run.plan else {}
    leads, inside = _places(details)
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    reads: dict[str, set[str]] = defaultdict(set)
    for tensor in details.tensors:
        for name in tensor.nodes:
            reads[name].add(words.kind(tensor.format))
            if tensor.sqnr_db is not None:
                errors[name, tensor.role].append(tensor.sqnr_db)
    rows = []
    for place, node in enumerate(details.nodes, 1):
        seen = audited.get(node.node)
        float_ = not node.asked and not reads.get(node.node)
        why = [skips[node.node]] if node.node in skips and float_ else []
        if seen is not None:
            why += [seen.cause] if seen.cause else []
            ran, low = words.kind(seen.consumed), words.kind(seen.consumed) in words.LOW
            kind, type_ = ("low" if low else "float"), ran
            if seen.missed:
                type_ = f"{ran}, not {words.kind(seen.requested)}"
            elif seen.requested.startswith("weight-only"):
                type_ = f"{ran}, {words.kind(seen.requested.split()[-1])} weights"
        elif node.asked:
            kind, type_ = "low", f"{asked_for(node.asked)}, as planned"
        elif reads.get(node.node):
            kind, type_ = "low", f"{' and '.join(sorted(reads[node.node]))} codes"
        else:
            kind, type_ = "other" if node.macs is None else "float", "float"
        rows.append(
            {
                "place": place,
                "node": node.node,
                "op": node.op_type,
                "type": type_,
                "kind": kind,
                "multiplies": node.macs is not None or seen is not None,
                "us": leads.get(node.node),
                "inside": "" if node.node in leads else inside.get(node.node, ""),
                "macs": node.macs,
                "data_db": min(errors.get((node.node, "activation"), ()), default=None),
                "weight_db": min(errors.get((node.node, "weight"), ()), default=None),
                "why": "; ".join(why),
            }
        )
    return rows


def asked_for(asked: str) -> str:
    """What Q/DQ nodes ask for, as in 'INT8' or 'INT4 weights'."""
    what, _, dtype = asked.rpartition(" ")
    return words.kind(dtype) + {"weight-only": " weights", "activation-only": " data"}.get(what, "")


def _places(details: Details) -> tuple[dict[str, float], dict[str, str]]:
    """Node -> time of the kernels that it leads; node -> the leading node of a kernel that it is in.

    A kernel is led by the node with most multiply-adds in it, else by the first of the network's order.
    """
    order = {node.node: (-(node.macs or 0), place) for place, node in enumerate(details.nodes)}
    leads: dict[str, float] = defaultdict(float)
    inside: dict[str, str] = {}
    for kernel in details.kernels:
        known = sorted((name for name in kernel.nodes if name in order), key=lambda name: order[name])
        if known:
            leads[known[0]] += kernel.us
            for name in known[1:]:
                inside.setdefault(name, known[0])
    return dict(leads), inside


def kernels(run: Run) -> dict[str, Any]:
    """Where the predicted time goes.

    Keys: `rows` (`name`, `more` nodes, `kind`, `type`, `bound`, `us`, `share`, `bar`), `total`, `count`, `gpus`,
    `stack` and `types` (share by type); without predicted times `rows` is empty, and `layers` has names alone.
    """
    details = run.report.details
    found = details.kernels if details else ()
    total = sum(kernel.us for kernel in found)
    if details is None or not total:
        return {"rows": [], "total": None, "count": len(_layers(run)), "layers": _layers(run)[:SHOWN]}
    order = {node.node: (-(node.macs or 0), place) for place, node in enumerate(details.nodes)}
    ordered = sorted(found, key=lambda kernel: -kernel.us)
    most = ordered[0].us
    rows = [_kernel(kernel, order, total, most) for kernel in ordered[:SHOWN]]
    rest = ordered[SHOWN:]
    if rest:
        us = sum(kernel.us for kernel in rest)
        name = f"{words.plural(len(rest), 'other kernel')}, at most {words.time(rest[0].us)} each"
        rows.append(
            {"name": name, "more": 0, "kind": "", "type": "", "bound": "", **_time(us, total, most, "rest"), "bar": ""}
        )
    by_type: dict[str, float] = defaultdict(float)
    for kernel in found:
        by_type[_type(kernel)] += kernel.us / total
    types = {name: (share, _class(name)) for name, share in sorted(by_type.items(), key=lambda pair: -pair[1])}
    said = ", ".join(f"{name} {words.share(share)}" for name, (share, _) in types.items())
    return {
        "rows": rows,
        "total": total,
        "count": len(found),
        "gpus": details.gpus,
        "types": [(name, words.share(share), kind) for name, (share, kind) in types.items()],
        "stack": stack(types, title=f"Share of the predicted time: {said}"),
        "layers": [],
    }


def _layers(run: Run) -> list[dict[str, str]]:
    """Kernels whose time is not known: name, kind, bytes."""
    layers = run.layers.layers if run.layers else ()
    return [{"name": layer.name, "kind": layer.kind} for layer in layers if layer.kind not in SYNCHRONIZATION]


def _kernel(kernel: KernelRow, order: dict[str, tuple[int, int]], total: float, most: float) -> dict[str, Any]:
    known = sorted((n for n in kernel.nodes if n in order), key=lambda n: order[n]) or list(kernel.nodes)
    type_ = _type(kernel)
    return {
        "name": known[0] if known else "no node of the network",
        "more": max(len(known) - 1, 0),
        "kind": kernel.kind,
        "type": type_,
        "bound": {"bandwidth": "memory", "compute": "arithmetic", "start": "its start"}.get(kernel.bound, kernel.bound),
        **_time(kernel.us, total, most, _class(type_)),
    }


def _time(us: float, total: float, most: float, kind: str) -> dict[str, Any]:
    return {"us": us, "share": words.share(us / total), "bar": bar(us / most, kind)}


def _type(kernel: KernelRow) -> str:
    return words.kind(kernel.dtype) if kernel.dtype else "no products"


def _class(type_: str) -> str:
    return "low" if type_ in words.LOW else "rest" if type_ == "no products" else "float"
