"""The night as a picture: devices in use and requests that wait, over the hours. SVG, written by hand."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulation.night import Night

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 300, 46, 56, 36

_STYLE = """
  .ground { fill: #ffffff; stroke: #d8dee4; }
  text { font: 12px system-ui, sans-serif; fill: #3d4751; }
  .title { font-size: 15px; font-weight: 600; }
  .used { fill: none; stroke: #2a6fdb; stroke-width: 1.5; }
  .waiting { fill: none; stroke: #e0a83c; stroke-width: 1.5; }
  .grid { stroke: #d8dee4; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; stroke: #30363d; }
    text { fill: #c3ccd5; }
    .grid { stroke: #30363d; }
  }
"""


def plot(found: "Night") -> str:
    """An SVG document; the same night gives the same bytes."""
    minutes = len(found.used)
    most = max(*found.used, *found.waiting, 1)

    def point(minute: int, value: float) -> tuple[float, float]:
        width, height = _WIDTH - _LEFT - 16, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + width * minute / minutes, _TOP + height * (1 - value / most)

    def line(kind: str, values: list[int]) -> str:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (point(*pair) for pair in enumerate(values)))
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>',
        '<text class="title" x="16" y="24">A simulated night</text>',
        '<text x="16" y="42">blue: devices in use; amber: requests that wait; by the hour</text>',
    ]
    for value in range(0, most + 1, max(most // 5, 1)):
        x, y = point(0, value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    for hour in range(minutes // 60 + 1):
        x, y = point(hour * 60, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{hour}</text>')
    parts += [line("used", found.used), line("waiting", found.waiting), "</svg>"]
    return "\n".join(parts) + "\n"
