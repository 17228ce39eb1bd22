"""The report: for a terminal, as JSON, and as the generated part of docs/benchmarks.md with its charts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.figures import Figure, Section
from bench.number import shown

_BEGIN = "<!-- What follows is written by make bench. -->\n"
_END = "<!-- What precedes is written by make bench. -->\n"
_PAGE = "benchmarks.md"
_COLUMNS = ("what", "measured", "of all rounds", "ratio", "target", "met")


def text(machine: dict[str, str], sections: Sequence[Section]) -> str:
    """For people at a terminal."""
    lines = [f"{name}: {fact}" for name, fact in machine.items()]
    for section in sections:
        lines += ["", section.title]
        lines += [f"  ! {gap}" for gap in section.gaps]
        if section.figures:
            lines += _aligned([_row(figure) for figure in section.figures])
    return "\n".join([*lines, "", summary(sections)])


def summary(sections: Iterable[Section]) -> str:
    judged = [figure for section in sections for figure in section.figures if figure.met is not None]
    missed = [figure for figure in judged if not figure.met]
    head = f"{len(judged) - len(missed)} of {len(judged)} targets are met"
    return head + "." if not missed else f"{head}; missed: {'; '.join(figure.name for figure in missed)}."


def write(
    directory: Path, machine: dict[str, str], plan: dict[str, object], sections: Sequence[Section]
) -> None:
    """The JSON, the charts, and the part between the marks of the page in `directory`, which must be there.

    Raises ValueError if the page has no such marks.
    """
    page = directory / _PAGE
    before, begin, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} has not the two comments that the figures go between")
    charts = directory / "benchmarks"
    charts.mkdir(exist_ok=True)
    for section in sections:
        for chart in section.charts:
            (charts / f"{chart.name}.svg").write_text(chart.svg(), encoding="utf-8")
    body = _markdown(machine, sections, charts.name)
    page.write_text(before + begin + body + end + after, encoding="utf-8")
    record = {"machine": machine, "plan": plan, "sections": [_plain(section) for section in sections]}
    (charts / "figures.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _plain(section: Section) -> dict[str, object]:
    return {
        "key": section.key,
        "title": section.title,
        "failed": section.failed,
        "gaps": section.gaps,
        "figures": [asdict(figure) for figure in section.figures],
    }


def _markdown(machine: dict[str, str], sections: Sequence[Section], charts: str) -> str:
    lines = ["", "| machine | |", "|---|---|"]
    lines += [f"| {name} | {fact} |" for name, fact in machine.items()]
    lines += ["", f"**{summary(sections)}**"]
    for section in sections:
        lines += ["", f"### {section.title}", ""]
        lines += [section.about, ""] if section.about else []
        for gap in section.gaps:
            lines += [f"**Missing:** {gap}", ""]
        for chart in section.charts:
            lines += [f"![{chart.title}]({charts}/{chart.name}.svg)", ""]
        if section.figures:
            lines += [f"| {' | '.join(_COLUMNS)} |", "|---|---:|---:|---:|---|---|"]
            lines += [f"| {' | '.join(_row(figure))} |" for figure in section.figures]
    return "\n".join([*lines, "", ""])


def _row(figure: Figure) -> tuple[str, ...]:
    """As `_COLUMNS`."""
    several = len(figure.rounds) > 1
    return (
        figure.name,
        f"{shown(figure.value)} {figure.unit}",
        f"{shown(figure.low)} to {shown(figure.high)}" if several else "",
        f"{shown(figure.ratio)} x {figure.to}" if figure.ratio is not None else "",
        figure.target.text(figure.unit) if figure.target else "",
        "" if figure.met is None else "yes" if figure.met else "**no**",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [_COLUMNS, *(tuple(cell.strip("*") for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
