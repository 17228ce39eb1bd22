"""The exit codes of the command line, after sysexits.h where that has one."""

from leasehold.client.errors import (
    AccessLost,
    BadAddress,
    BadRequest,
    Busy,
    LeaseholdError,
    NoCoordinator,
    NotFound,
    Refused,
    TimedOut,
    Untrusted,
)

BROKEN = 1
USAGE = 2
"""What the daemons return too for a configuration that can not be used."""
BAD_REQUEST = 65
NOT_FOUND = 66
NO_COORDINATOR = 69
FAULT = 70
NOT_ATTACHED = 74
LOST = 75
REFUSED = 77
TIMED_OUT = 124
NOT_RUN = 126
NO_COMMAND = 127

HELP = """\b
Exit codes:
    0  done
    1  a promise was broken (demo), the answer was no (apply), a daemon can not go on
    2  wrong usage; a configuration, address, certificate, directory or port that can not
       be used; not installed
   65  the request can not be done as asked
   66  no such device, controller or request
   69  no coordinator answered, or it takes no more requests now
   70  a fault in Leasehold
   74  attach: TARGET could not be made, or not be used
   75  run: the access was lost or moved, COMMAND was stopped or failed with it; run
       it again
   77  refused
  124  waited as long as --wait or --within says
  126  run: COMMAND can not be run
  127  run: COMMAND was not found
128+N  ended by signal N
Otherwise, run passes on the exit code of COMMAND."""

_CODES: tuple[tuple[type[LeaseholdError], int], ...] = (
    (NotFound, NOT_FOUND),
    (BadAddress, USAGE),
    (BadRequest, BAD_REQUEST),
    (NoCoordinator, NO_COORDINATOR),
    (Untrusted, USAGE),
    (Busy, NO_COORDINATOR),
    (AccessLost, LOST),
    (Refused, REFUSED),
    (TimedOut, TIMED_OUT),
)


def code_of(error: LeaseholdError) -> int:
    """The exit code that stands for `error`."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAULT)
