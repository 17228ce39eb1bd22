"""What a section found."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from bench.chart import Bar, Chart


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for a figure, or with `of_ratio` for its ratio."""

    limit: float
    at_most: bool = True
    of_ratio: bool = False

    def met(self, value: float, ratio: float | None) -> bool:
        judged = ratio if self.of_ratio else value
        if judged is None:
            return False
        return judged <= self.limit if self.at_most else judged >= self.limit

    def text(self, unit: str) -> str:
        sign = "at most" if self.at_most else "at least"
        return f"{sign} {self.limit:g}" if self.of_ratio else f"{sign} {self.limit:g} {unit}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: the median of `rounds`, each round's own first."""

    name: str
    unit: str
    rounds: tuple[float, ...]
    value: float
    ratio: float | None = None
    to: str = ""
    """What the ratio is to."""
    target: Target | None = None
    met: bool | None = None
    """None without a target."""

    @classmethod
    def of(
        cls,
        name: str,
        rounds: Sequence[float],
        unit: str,
        *,
        base: float | None = None,
        to: str = "",
        target: Target | None = None,
        worst: bool = False,
    ) -> Self:
        """`base` is what the ratio is to. With `worst` the highest counts, not the median."""
        value = max(rounds) if worst else statistics.median(rounds)
        ratio = value / base if base else None
        met = target.met(value, ratio) if target else None
        return cls(name, unit, tuple(rounds), value, ratio, to, target, met)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    def bar(self, label: str, kind: str = "ours") -> Bar:
        return Bar(label, self.value, self.low, self.high, kind)


@dataclass(slots=True)
class Section:
    """One section of the report. `gaps` says what is missing and why; `failed` that it was not for want of a
    tool."""

    key: str
    title: str
    about: str = ""
    figures: list[Figure] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    failed: bool = False
