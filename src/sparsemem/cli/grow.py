"""grow."""

import argparse
from typing import Any

from sparsemem import console
from sparsemem.cli.model import add_making
from sparsemem.cli.options import add_folder_command, config_from
from sparsemem.config import LoadConfig


def add_grow(commands: Any) -> None:
    """Add `grow`."""
    parser = add_folder_command(
        commands,
        "grow",
        "make a folder with more slots, in which everything learned so far still reads the same",
        "sparsemem grow smol --num-keys 2048 --background wiki.txt --out smol-4m",
        grow,
    )
    parser.add_argument(
        "--num-keys", type=int, required=True, metavar="N",
        help="sub-keys per half from now on; the memory will have N * N slots",
    )  # fmt: skip
    add_making(parser)


def grow(args: argparse.Namespace) -> None:
    """Run `grow`."""
    from sparsemem.study.grow import grow_folder

    result = grow_folder(
        args.folder,
        args.background,
        args.out,
        args.num_keys,
        num_tokens=args.num_tokens,
        num_documents=args.num_documents,
        loading=config_from(args, LoadConfig),
    )
    if args.json:
        console.emit_json(result)
        return
    console.say(
        f"{args.out}: {result['num_slots']:,} slots in place of {result['num_slots_before']:,}, "
        f"with all rows and the whole history"
    )
    for index, layer in result["layers"].items():
        if layer["num_kept_states"]:
            console.say(
                f"block {index}: {layer['num_moved_states']} of {layer['num_kept_states']} places where the "
                f"{result['num_facts']} learned facts name their subject read another slot now"
            )
        console.say(
            f"block {index}: ordinary text reads {layer['kept']:.1%} as before, "
            f"and {layer['new']:.1%} in new slots"
        )
