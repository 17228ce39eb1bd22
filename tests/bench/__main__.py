"""The command. See the package."""

import argparse
import asyncio
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench import control, datapath, idle, lun, machine, report, takeover
from bench.figures import Section
from bench.plan import FULL, QUICK, Plan
from leasehold.client import etcd

_ROOT = Path(__file__).parents[2]

Measure = Callable[[Plan, Callable[[str], None]], Awaitable[list[Section]]]

MEASURES: dict[str, Measure] = {
    "control": partial(control.measure, environments=_ROOT),
    "takeover": takeover.measure,
    "datapath": datapath.measure,
    "idle": idle.measure,
    "lun": lun.measure,
}


def main() -> int:
    arguments = _arguments()
    plan = QUICK if arguments.quick else FULL
    into = arguments.into or (None if arguments.quick or arguments.only else _ROOT / "docs")
    try:
        binary = etcd.find()
    except etcd.NoEtcd as error:
        _say(f"nothing can be measured: {error}")
        return 2
    where = datapath.place(plan.size)
    about = machine.describe(
        ".".join(map(str, binary.version)), Path(tempfile.gettempdir()).resolve(), where.resolve()
    )
    sections: list[Section] = []
    for name in arguments.only or MEASURES:
        sections += _measured(name, MEASURES[name], plan)
    print(report.text(about, sections))
    if into is not None:
        report.write(into, about, asdict(plan), sections)
        _say(f"written into {into}")
    return 1 if any(section.failed for section in sections) else 0


def _measured(name: str, measure: Measure, plan: Plan) -> list[Section]:
    try:
        return asyncio.run(_run(measure, plan))
    except Exception as error:  # noqa: BLE001 - the other sections are worth having; the run fails all the same
        traceback.print_exc()
        return [Section(name, f"{name}: failed", gaps=[f"{type(error).__name__}: {error}"], failed=True)]


async def _run(measure: Measure, plan: Plan) -> list[Section]:
    return await measure(plan, _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="measure Leasehold beside its peers")
    parser.add_argument("--quick", action="store_true", help="one short round; docs/ stays as it is")
    parser.add_argument("--only", action="append", choices=tuple(MEASURES), help="only this; docs/ stays too")
    parser.add_argument("--into", type=Path, metavar="DIR", help="write into this directory instead of docs/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
