"""plan."""

import argparse
from collections.abc import Mapping
from typing import Any

from sparsemem import console
from sparsemem.cli.options import add_folder_command, add_loading, config_from
from sparsemem.cli.tables import size
from sparsemem.config import LoadConfig


def add_plan(commands: Any) -> None:
    """Add `plan`."""
    parser = add_folder_command(
        commands,
        "plan",
        "show how full a memory is and what it takes, and recommend one thing",
        "sparsemem plan smol --background wiki.txt",
        plan,
    )
    parser.add_argument(
        "--background", nargs="+", default=[], metavar="TEXT",
        help="ordinary text, to measure how much of it something learned answers to",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, metavar="SHARE",
        help="share of the tokens of --background whose predictions may change (default: 0.01)",
    )  # fmt: skip
    add_loading(parser)


def plan(args: argparse.Namespace) -> None:
    """Run `plan`."""
    from sparsemem.study.plan import plan_folder

    result = plan_folder(
        args.folder, args.background, budget=args.budget, loading=config_from(args, LoadConfig)
    )
    if args.json:
        console.emit_json(result)
    else:
        _show(result)


def _show(result: Mapping[str, Any]) -> None:
    for name, pool in result["pools"].items():
        fires = "not measured (--background)" if pool["fires"] is None else f"{pool['fires']:.2%}"
        rows = (
            ("slots", f"{pool['num_slots']:,}"),
            ("written", f"{pool['num_written']:,} ({pool['fill']:.2%})"),
            ("wanted by more than one update", f"{pool['num_shared']:,}"),
            ("of a new fact's slots, taken (law)", f"{pool['taken']:.1%}"),
            ("room for more facts", f"{pool['room']:,}"),
            ("reads of ordinary text in the top 1 % of slots", f"{pool['hub_share']:.1%}"),
            ("reads of ordinary text that find a written slot", f"{pool['hit_share']:.2%}"),
            ("tokens of ordinary text that fire", fires),
        )
        console.table(name, ("", "value"), rows)
    for where, key in (("on disk", "disk_bytes"), ("in memory", "memory_bytes")):
        parts = ", ".join(f"{what} {size(number)}" for what, number in result[key].items() if number)
        console.say(f"{where}: {size(sum(result[key].values()))} ({parts})")
    console.say(f"updates: {result['num_updates']}, facts in them: {result['num_facts']}")
    console.say(f"recommendation: {result['recommendation']}; {result['reason']}", style="bold")
