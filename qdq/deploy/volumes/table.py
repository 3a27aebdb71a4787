"""What whole volumes say, as tables for people. Must not print or measure."""

from __future__ import annotations

from collections.abc import Iterator

from engines.verify.volumes import Mean, StructureReport, VolumeComparison, VolumeReport

SHOWN = 12  # structures, the poorest first; the JSON has all
HEADERS = ("structure", "Dice", "HD95, mm", "mean surface, mm", "volume, ml", "lesions", "cases")


def tables(report: VolumeReport) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Title and rows of each comparison."""
    for compared in (report.to_float, *report.to_labels):
        count = len(compared.cases)
        title = f"{compared.found} against {compared.true}, {count} whole volume{'s' * (count > 1)}"
        yield title, rows(compared)


def rows(compared: VolumeComparison) -> list[tuple[str, ...]]:
    """A head, and one row for each structure; means with their 95 % intervals, and over how many cases each is."""
    ordered = sorted(compared.structures, key=lambda s: s.dice.mean if s.dice else 2.0)
    found = [HEADERS, *(_row(s) for s in ordered[:SHOWN])]
    more = len(ordered) - SHOWN
    return [*found, (f"{more} more, all of a higher Dice", *[""] * (len(HEADERS) - 1))] if more > 0 else found


def lines(report: VolumeReport) -> list[str]:
    """How the figures were made, one sentence each."""
    said = [
        f"Whole volumes: {report.window}; {report.decoded}; on the image's own grid by {report.grid}.",
        "HD95 is the larger of both directed 95th percentiles between border voxels, and the mean surface distance "
        "pools both directions, as MONAI has them. Brackets, from 3 cases on: 95 % of resampled means (bootstrap over "
        "cases).",
    ]
    left = [c.without_truth for c in report.to_labels if c.without_truth]
    if left:
        said.append(f"{left[0]} of {report.cases} volumes have no label and count against the float model alone.")
    if report.repeated:
        said.append(
            f"{report.repeated} of {report.windows} runs were made again because a slab of all channels did not fit: a "
            "larger --memory spares them."
        )
    return said


def _row(s: StructureReport) -> tuple[str, ...]:
    lesions = f"{s.missed} of {s.lesions} missed, {s.false} false"
    largest = max(s.missed_ml, s.false_ml)
    return (
        s.name,
        _mean(s.dice, "{:.4f}", s.worst_dice, "least"),
        _mean(s.hd95_mm, "{:.3g}", s.worst_hd95_mm, "most"),
        _mean(s.surface_mm, "{:.3g}", None, ""),
        _mean(s.difference_ml, "{:+.3g}", s.worst_difference_ml, "most"),
        f"{lesions}, the largest {largest:.3g} ml" if largest else lesions,
        _cases(s),
    )


def _mean(mean: Mean | None, form: str, worst: float | None, word: str) -> str:
    if mean is None:
        return "none"
    between = f" [{form.format(mean.low)}, {form.format(mean.high)}]" if mean.low is not None else ""
    extreme = f", {word} {form.format(worst)}" if worst is not None and mean.cases > 1 else ""
    return f"{form.format(mean.mean)}{between}{extreme}"


def _cases(s: StructureReport) -> str:
    """Over how many cases the means are, and why others are not in them."""
    dice, distance = (mean.cases if mean else 0 for mean in (s.dice, s.hd95_mm))
    why = [
        f"{count} {what}"
        for count, what in ((s.empty, "empty in both"), (s.only_found, "only found"), (s.only_true, "only true"))
        if count
    ]
    counted = f"{dice}" if dice == distance else f"{dice} (distances {distance})"
    return counted + (f"; {', '.join(why)}" if why else "")
