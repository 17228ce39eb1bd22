"""Makes every gate allow everything, in all that is started with this directory in PYTHONPATH.

For showing that the tests of what the gate protects do fail without it.
"""

from leasehold.controller.gate import Gate


def _always(_self: Gate, _slot: int, _epoch: int) -> bool:
    return True


Gate.allows = _always  # type: ignore[assignment]
