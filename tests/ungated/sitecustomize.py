"""Makes every gate and label allow everything, in all that is started with this directory in PYTHONPATH.

For showing that the tests of what the gate protects do fail without it.
"""

from leasehold.controller.gate import Gate
from leasehold.controller.label import Registration


def _always(_self: Gate, _slot: int, _epoch: int) -> bool:
    return True


Gate.allows = _always  # type: ignore[assignment]
Registration.stands = lambda _self: True  # type: ignore[assignment, method-assign]
