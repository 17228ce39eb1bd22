"""How figures are summed up and shown."""

from collections.abc import Sequence


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def shown(value: float) -> str:
    """Three digits, or all of a large number."""
    if value >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
