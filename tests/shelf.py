#!/usr/bin/env python3
"""A program for the `exec` driver: a shelf of files that remembers who may write to it.

Run as a program it does the verb that it is given. Its parameter `at` is a directory that all its users
reach; the file `fence` there has the lowest epoch that the shelf still takes writes from.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    verb, request = sys.argv[1], json.load(sys.stdin)
    shelf = Path(request["parameters"]["at"])
    with (shelf / "calls").open("a") as calls:
        calls.write(f"{os.environ.get('LEASEHOLD_CONTROLLER')} {verb} {request.get('epoch')}\n")
    misbehaving = shelf / f"{verb}-does"
    if misbehaving.exists():
        return misbehave(misbehaving.read_text().strip())
    if verb == "probe":
        if not shelf.is_dir():
            print(json.dumps({"reason": f"there is no {shelf}"}))
            return 3
        return 0
    epoch, floor = request["epoch"], shelf / "fence"
    lowest = int(floor.read_text()) if floor.exists() else 0
    if verb == "prepare" and epoch < lowest:
        print(json.dumps({"reason": f"the shelf has seen epoch {lowest}", "highest": lowest}))
        return 4
    if verb == "fence":
        floor.write_text(str(epoch))
    if verb == "activate":
        (shelf / f"active-{epoch}").touch()
        print(
            json.dumps({"path": f"shelf://{os.environ['LEASEHOLD_CONTROLLER']}/{request['device']}-{epoch}"})
        )
    if verb == "verify" and not (shelf / f"active-{epoch}").exists():
        print(json.dumps({"reason": "it is not on the shelf any more"}))
        return 1
    if verb == "deactivate":
        (shelf / f"active-{epoch}").unlink(missing_ok=True)
    return 0


def misbehave(how: str) -> int:
    match how:
        case "hang":
            time.sleep(600)
        case "flood":
            while True:
                print("x" * 65536)
        case "garbage":
            print("well, hello")
        case "leave":
            # A process in the group, with the pipes, that ignores what it is told.
            if os.fork() == 0:
                import signal  # noqa: PLC0415

                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
        case "fail":
            print("it jammed\nbadly", file=sys.stderr)
            return 1
        case "die":
            os.kill(os.getpid(), 9)
    return 0


if __name__ == "__main__":
    sys.exit(main())
