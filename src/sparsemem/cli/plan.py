"""plan."""

import argparse
from collections.abc import Mapping
from typing import Any

from sparsemem import console
from sparsemem.cli.options import add_command
from sparsemem.cli.tables import size


def add_plan(commands: Any) -> None:
    """Add `plan`."""
    parser = add_command(
        commands,
        "plan",
        "show how full a memory is and what it takes, and recommend one thing",
        "sparsemem plan smol",
        plan,
    )
    parser.add_argument("folder", metavar="DIR", help="folder made by attach")


def plan(args: argparse.Namespace) -> None:
    """Run `plan`."""
    from sparsemem.study.plan import plan_folder

    result = plan_folder(args.folder)
    if args.json:
        console.emit_json(result)
    else:
        _show(result)


def _show(result: Mapping[str, Any]) -> None:
    for name, pool in result["pools"].items():
        rows = (
            ("slots", f"{pool['num_slots']:,}"),
            ("written", f"{pool['num_written']:,} ({pool['fill']:.2%})"),
            ("wanted by more than one update", f"{pool['num_shared']:,}"),
            ("reads of ordinary text in the top 1 % of slots", f"{pool['hub_share']:.1%}"),
            ("reads of the mean token that find a written slot", f"{pool['hit_share']:.2%}"),
            ("what it gets for that of an answer, 0 to 1", f"{pool['accident']:.2g}"),
        )
        console.table(name, ("", "value"), rows)
    for where, key in (("on disk", "disk_bytes"), ("in memory", "memory_bytes")):
        parts = ", ".join(f"{what} {size(number)}" for what, number in result[key].items() if number)
        console.say(f"{where}: {size(sum(result[key].values()))} ({parts})")
    console.say(f"updates: {result['num_updates']}, facts in them: {result['num_facts']}{_left(result)}")
    console.say(f"recommendation: {result['recommendation']}; {result['reason']}", style="bold")


def _left(result: Mapping[str, Any]) -> str:
    if result["facts_left"] is None:
        return ""
    return f"; at this rate about {result['facts_left']:,} more until accidents are too many (extrapolated)"
