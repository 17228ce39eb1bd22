"""Bar charts as SVG, written by hand: the same figures give the same bytes, and nothing is needed for it."""

from dataclasses import dataclass
from html import escape

from bench.number import shown

_WIDTH = 760
_LABELS = 210
"""Width of the column on the left."""
_VALUES = 110
"""Room on the right, for the value of the longest bar."""
_BAR = 18
_STEP = 25
_GROUP = 32
_TOP = 62

_STYLE = """
  .ground { fill: #ffffff; stroke: #d8dee4; }
  text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #3d4751; }
  .title { font-size: 15px; font-weight: 600; fill: #1f2328; }
  .group { font-weight: 600; }
  .value { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
  .soft { fill: #6b7680; }
  .axis { stroke: #d8dee4; }
  .ours { fill: #2a6fdb; }
  .peer { fill: #a8b3bf; }
  .base { fill: #e0a83c; }
  .range { stroke: #1f2328; stroke-opacity: 0.65; }
  .target { stroke: #c93c37; stroke-width: 1.5; stroke-dasharray: 4 3; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; stroke: #30363d; }
    text { fill: #c3ccd5; }
    .title { fill: #f0f6fc; }
    .value { stroke: #0d1117; }
    .soft { fill: #8b96a1; }
    .axis { stroke: #30363d; }
    .ours { fill: #4f8ff0; }
    .peer { fill: #5d6874; }
    .range { stroke: #f0f6fc; }
    .target { stroke: #f47067; }
  }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """`kind` is one of ours, peer, base. `low` and `high` are the least and the most of all rounds."""

    label: str
    value: float
    low: float
    high: float
    kind: str = "ours"


@dataclass(frozen=True, slots=True)
class Group:
    """Bars below one heading; with a target, a line across them."""

    label: str
    bars: tuple[Bar, ...]
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """`name` is that of its file, without a suffix."""

    name: str
    title: str
    subtitle: str
    unit: str
    groups: tuple[Group, ...]

    def svg(self) -> str:
        """Text of the file."""
        longest = max(
            max((bar.high for bar in group.bars), default=0.0)
            if group.target is None
            else max(group.target, *(bar.high for bar in group.bars))
            for group in self.groups
        )
        scale = (_WIDTH - _LABELS - _VALUES) / (longest or 1.0)
        body: list[str] = []
        y = _TOP
        for group in self.groups:
            y = _draw(group, y, scale, self.unit, body)
        height = y + 12
        words = escape(f"{self.title}: {self.subtitle}")
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
            f' viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{words}">',
            f"<style>{_STYLE}</style>",
            f'<rect class="ground" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="6"/>',
            f'<text class="title" x="16" y="27">{escape(self.title)}</text>',
            f'<text class="soft" x="16" y="46">{escape(self.subtitle)}</text>',
        ]
        return "\n".join([*head, *body, "</svg>"]) + "\n"


def _draw(group: Group, y: int, scale: float, unit: str, body: list[str]) -> int:
    """Append the elements of `group`; returns where the next one begins."""
    if group.label:
        body.append(f'<text class="group" x="16" y="{y + 18}">{escape(group.label)}</text>')
        y += _GROUP - 6
    top = y
    values: list[str] = []
    for bar in group.bars:
        middle = y + _BAR / 2
        width = max(bar.value * scale, 1.0)
        body.append(
            f'<text x="{_LABELS - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.label)}</text>'
        )
        body.append(
            f'<rect class="{bar.kind}" x="{_LABELS}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>'
        )
        end = width
        if bar.high > bar.low:
            start, end = bar.low * scale, max(width, bar.high * scale)
            body.append(_line("range", start, middle, bar.high * scale, middle))
            body.extend(_line("range", x, middle - 4, x, middle + 4) for x in (start, bar.high * scale))
        x = _LABELS + end + 8
        value = f"{shown(bar.value)} {escape(unit)}"
        values.append(f'<text class="value" x="{x:.1f}" y="{middle + 4:.1f}">{value}</text>')
        y += _STEP
    bottom = y - (_STEP - _BAR)
    body.append(_line("axis", 0, top - 3, 0, bottom + 3))
    if group.target is not None:
        x = group.target * scale
        body.append(_line("target", x, top - 6, x, bottom + 6))
    # Last, because the line of the target may cross them.
    body.extend(values)
    return y + 6


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """Along the bars x begins where they do."""
    return (
        f'<line class="{kind}" x1="{_LABELS + x1:.1f}" y1="{y1:.1f}" x2="{_LABELS + x2:.1f}" y2="{y2:.1f}"/>'
    )
