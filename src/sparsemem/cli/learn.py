"""learn."""

import argparse
from typing import Any

from sparsemem import console
from sparsemem.cli.model import add_probes, add_prompt
from sparsemem.cli.options import add_config_options, add_folder_command, add_loading, config_from
from sparsemem.cli.tables import show_report
from sparsemem.config import FinetuneConfig, LoadConfig
from sparsemem.errors import ConfigError


def add_learn(commands: Any) -> None:
    """Add `learn`."""
    parser = add_folder_command(
        commands,
        "learn",
        "teach facts, measure learning and forgetting, commit the update",
        'sparsemem learn smol facts.jsonl -m "the new price list"\n  sparsemem learn smol --undo',
        learn,
    )
    parser.add_argument(
        "facts", nargs="?", metavar="FACTS", help="facts or documents: .jsonl, .txt, .parquet, Hub"
    )
    parser.add_argument("-m", "--message", default="", metavar="TEXT", help="what this update is")
    parser.add_argument("--undo", action="store_true", help="take the last update back, exactly")
    parser.add_argument(
        "--hash-facts",
        action="store_true",
        help="keep hashes of the facts in the history, not their text",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="teach facts that contradict some taught before, in their place",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="spread the base model over the processes of torchrun or accelerate launch (FSDP2); memory only",
    )
    parser.add_argument("--out", metavar="DIR", help="save the model or adapter of a baseline method")
    add_training(parser)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that trains."""
    parser.add_argument(
        "--background", nargs="+", default=[], metavar="TEXT", help="ordinary text, for penalties and replay"
    )
    add_probes(parser)
    add_prompt(parser)
    add_loading(parser)
    add_config_options(parser, FinetuneConfig, "training")


def learn(args: argparse.Namespace) -> None:
    """Run `learn`, or `learn --undo`."""
    if args.undo:
        return _undo(args)
    if not args.facts:
        raise ConfigError("no FACTS given; name a file of facts, or use --undo to take the last update back")
    config = config_from(args, FinetuneConfig)
    from sparsemem.study.learn import learn as learn_facts

    report = learn_facts(
        args.folder,
        args.facts,
        probes=args.probes,
        config=config,
        background=args.background,
        message=args.message,
        prompt=args.prompt,
        out=args.out,
        hash_facts=args.hash_facts,
        replace=args.replace,
        loading=config_from(args, LoadConfig),
        fsdp=args.fsdp,
    )
    if args.json:
        console.emit_json(report)
    else:
        show_report(report)


def _undo(args: argparse.Namespace) -> None:
    if args.facts or args.fsdp:
        raise ConfigError("--undo takes no FACTS and no --fsdp; leave them out")
    from sparsemem import distributed
    from sparsemem.memory.checkpoint import read_header
    from sparsemem.store.history import DeltaStore

    store = DeltaStore(args.folder)
    read_header(store.folder)
    number = len(store)
    commit, delta = distributed.from_main(store.undo)
    if args.json:
        undone = {"number": number, "commit": commit.id, "digest": commit.digest, "message": commit.message}
        console.emit_json({"undone": undone, "num_slots": delta.num_slots_trained, "num_updates": len(store)})
    else:
        console.say(
            f"took back update {number}, {commit.title}: "
            f"{delta.num_slots_trained} slots are what they were; {len(store)} updates are left"
        )
