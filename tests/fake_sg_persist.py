#!/usr/bin/env python3
"""Stands in for sg_persist and sg_reset: a device whose state is in `state.json` beside the file named.

Files in one directory are nexuses with one device. Output and exit statuses are those of sg_persist 0.67 and
sg3_utils(8). `once` in the state is a list of exit statuses to end with before anything is done.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

TYPES = {
    1: "Write Exclusive",
    3: "Exclusive Access",
    5: "Write Exclusive, registrants only",
    6: "Exclusive Access, registrants only",
}


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("no-inquiry", "in", "out", "readonly", "param-aptpl", "no-esc", "device"):
        parser.add_argument(f"--{flag}", action="store_true")
    actions = parser.add_mutually_exclusive_group()
    for flag in ("read-keys", "read-reservation", "report-capabilities", "register-ignore"):
        actions.add_argument(f"--{flag}", action="store_true")
    for flag in ("reserve", "release", "preempt", "preempt-abort"):
        actions.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--param-rk", type=lambda text: int(text, 16), default=0)
    parser.add_argument("--param-sark", type=lambda text: int(text, 16), default=0)
    parser.add_argument("--prout-type", type=int, default=0)
    parser.add_argument("node", type=Path)
    asked = parser.parse_args()
    place = asked.node.parent / "state.json"
    state = json.loads(place.read_text())
    code = carry_out(asked, state)
    place.write_text(json.dumps(state))
    if code:
        sys.stderr.write(f"PR failed: {code}\n")
    return code


def carry_out(asked: argparse.Namespace, state: dict[str, Any]) -> int:
    state["seen"].append(sys.argv[1:-1])
    if state["once"]:
        code: int = state["once"].pop(0)
        if code < 0:
            time.sleep(60)
        return code
    keys, held, me = state["keys"], state["held"], asked.node.name
    if asked.no_esc and asked.device:
        state["resets"] += 1
        return 0
    if asked.report_capabilities:
        sys.stdout.write(state["capabilities"])
        return 0
    if asked.read_keys or asked.read_reservation:
        sys.stdout.write(f"  PR generation=0x{state['generation']:x}, ")
        sys.stdout.write(told_keys(keys) if asked.read_keys else told_reservation(keys, held))
        return 0
    if not asked.out:
        return 1
    if asked.register_ignore:
        keys.pop(me, None)
        if asked.param_sark:
            keys[me] = asked.param_sark
        elif held and held[0] == me:
            held.clear()
        state["generation"] += 1
        return 0
    if keys.get(me) != asked.param_rk:
        return 24
    return change(asked, state)


def change(asked: argparse.Namespace, state: dict[str, Any]) -> int:
    keys, held, me = state["keys"], state["held"], asked.node.name
    if asked.reserve:
        if held and held != [me, asked.prout_type]:
            return 24
        held[:] = [me, asked.prout_type]
    elif asked.release:
        if held == [me, asked.prout_type]:
            held.clear()
    elif asked.preempt_abort and not state["aborts"]:
        return 5
    else:
        victims = [nexus for nexus, key in keys.items() if key == asked.param_sark]
        if not victims:
            return 24
        if held and held[0] in victims:
            held[:] = [me, asked.prout_type]
        for nexus in victims:
            if nexus != me:
                del keys[nexus]
        state["generation"] += 1
    return 0


def told_keys(keys: dict[str, int]) -> str:
    if not keys:
        return "there are NO registered reservation keys\n"
    one = "1 registered reservation key follows:\n"
    head = one if len(keys) == 1 else f"{len(keys)} registered reservation keys follow:\n"
    return head + "".join(f"    0x{key:x}\n" for key in keys.values())


def told_reservation(keys: dict[str, int], held: list[Any]) -> str:
    if not held:
        return "there is NO reservation held\n"
    key, kind = keys[held[0]], TYPES[held[1]]
    return f"Reservation follows:\n    Key=0x{key:x}\n    scope: LU_SCOPE,  type: {kind}\n"


sys.exit(main())
