"""What the benchmark makes of its figures. What it measures is nobody's to test."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import report
from bench.chart import Bar, Chart, Group
from bench.figures import Figure, Section, Target
from bench.number import percentile, shown

_PAGE = "# Title\n\nBy hand & <kept>.\n\n{}old figures\n{}\nBelow.\n"
_MARKS = (
    "<!-- What follows is written by make bench. -->\n",
    "<!-- What precedes is written by make bench. -->\n",
)


def section() -> Section:
    fast = Figure.of("fast", [3.0, 1.0, 2.0], "ms", base=0.5, to="a commit", target=Target(3, of_ratio=True))
    slow = Figure.of("slow", [5.0], "s", target=Target(7))
    bars = (fast.bar("fast <&>"), slow.bar("slow", "peer"))
    chart = Chart("one", "One & only", "shorter is better", "ms", (Group("", bars, 4.0),))
    return Section("s", "1. Speed", "About it.", [fast, slow], ["x was not measured: no x."], [chart])


@pytest.mark.parametrize(
    ("target", "value", "ratio", "met"),
    [
        (Target(8), 8.0, None, True),
        (Target(8), 8.1, 1.0, False),
        (Target(0.2, at_most=False, of_ratio=True), 100.0, 0.2, True),
        (Target(0.2, at_most=False, of_ratio=True), 100.0, 0.19, False),
        (Target(0.2, at_most=False, of_ratio=True), 100.0, None, False),
    ],
)
def test_targets(target: Target, value: float, ratio: float | None, met: bool) -> None:
    assert target.met(value, ratio) is met


def test_a_figure_is_the_median_or_the_worst() -> None:
    figure = Figure.of("f", [4.0, 1.0, 2.0], "s", base=4.0, to="a commit")
    assert (figure.value, figure.low, figure.high, figure.ratio, figure.met) == (2.0, 1.0, 4.0, 0.5, None)
    assert Figure.of("f", [4.0, 1.0, 2.0], "s", target=Target(3), worst=True).met is False


def test_numbers() -> None:
    assert [shown(value) for value in (0.123, 9.949, 9.96, 99.6, 12345.6)] == [
        "0.12",
        "9.95",
        "10.0",
        "100",
        "12,346",
    ]
    assert percentile(range(100), 0.99) == 99
    assert percentile([7.0], 0.99) == 7.0


def test_a_chart_is_the_same_text_each_time_and_holds_all_its_bars() -> None:
    chart = section().charts[0]
    text = chart.svg()
    assert text == section().charts[0].svg()
    root = ElementTree.fromstring(text)
    width = float(root.attrib["width"])
    bars = [item for item in root.iter() if item.get("class") in ("ours", "peer")]
    assert len(bars) == 2
    assert all(float(bar.attrib["x"]) + float(bar.attrib["width"]) < width for bar in bars)
    assert "fast <&>" in [item.text for item in root.iter()]


def test_a_chart_of_nothing_but_zeroes() -> None:
    ElementTree.fromstring(Chart("z", "Zero", "", "%", (Group("", (Bar("b", 0.0, 0.0, 0.0),)),)).svg())


def test_the_page_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(_PAGE.format(*_MARKS), encoding="utf-8")
    for _ in range(2):
        report.write(tmp_path, {"etcd": "3.5.30"}, {"rounds": 3}, [section()])
        before, rest = page.read_text(encoding="utf-8").split(_MARKS[0])
        figures, after = rest.split(_MARKS[1])
        assert (before, after) == ("# Title\n\nBy hand & <kept>.\n\n", "\nBelow.\n")
        assert "old figures" not in figures
        assert "| fast | 2.00 ms | 1.00 to 3.00 | 4.00 x a commit | at most 3 | **no** |" in figures
        assert "1 of 2 targets are met; missed: fast." in figures
        assert "x was not measured: no x." in figures
        assert "](benchmarks/one.svg)" in figures
    assert (tmp_path / "benchmarks" / "one.svg").read_text(encoding="utf-8") == section().charts[0].svg()
    written = json.loads((tmp_path / "benchmarks" / "figures.json").read_text(encoding="utf-8"))
    assert written["sections"][0]["figures"][0]["rounds"] == [3.0, 1.0, 2.0]
    assert written["plan"] == {"rounds": 3}


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("by hand", encoding="utf-8")
    with pytest.raises(ValueError, match="two comments"):
        report.write(tmp_path, {}, {}, [section()])
    assert page.read_text(encoding="utf-8") == "by hand"
    assert [path.name for path in tmp_path.iterdir()] == ["benchmarks.md"]
