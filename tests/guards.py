"""How a test takes guards away from the programs it starts. Which there are, see `without/without.py`."""

from pathlib import Path

WITHOUT = Path(__file__).parent / "without"


def unguarded(*guards: str) -> dict[str, str]:
    """What to add to the environment of a program."""
    return {"PYTHONPATH": str(WITHOUT), "LEASEHOLD_TEST_WITHOUT": ",".join(guards)}
