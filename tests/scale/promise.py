"""What is measured, and what is promised of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Promise:
    """`most` is None where nothing is promised."""

    name: str
    value: float
    unit: str
    most: float | None = None

    @property
    def kept(self) -> bool:
        return self.most is None or self.value <= self.most

    def __str__(self) -> str:
        judged = "" if self.most is None else f"   at most {self.most:g}: {'kept' if self.kept else 'MISSED'}"
        return f"{self.name:<70} {self.value:>9.1f} {self.unit}{judged}"
