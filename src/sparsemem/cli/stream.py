"""stream, review, approve, reject."""

import argparse
import contextlib
from typing import Any

from sparsemem import console
from sparsemem.cli.learn import add_training
from sparsemem.cli.options import add_folder_command, config_from
from sparsemem.config import FinetuneConfig, LoadConfig


def add_stream(commands: Any) -> None:
    """Add `stream` and the commands of its review queue."""
    parser = add_folder_command(
        commands,
        "stream",
        "learn continually from a source, one commit per batch, never a row twice",
        "sparsemem stream smol facts.jsonl --follow --policy policy.yaml",
        stream,
    )
    parser.add_argument("source", metavar="SOURCE", help="a .jsonl that may grow, a folder, or - for stdin")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="facts per update")
    parser.add_argument("--follow", action="store_true", help="wait for more at the end, until Ctrl-C")
    parser.add_argument("--propose", action="store_true", help="put the facts up for review, learn nothing")
    _add_learning(parser)

    review = add_folder_command(
        commands, "review", "list facts that wait for a decision", "sparsemem review smol", show_review
    )
    review.add_argument("--all", action="store_true", help="decided ones too")
    for name, summary, run in (
        ("approve", "learn facts that wait for review", approve),
        ("reject", "turn facts down for good", reject),
    ):
        decides = add_folder_command(commands, name, summary, f"sparsemem {name} smol 3f2a91", run)
        decides.add_argument("facts", nargs="+", metavar="SHA", help='as review lists them, or "all"')
        if name == "approve":
            _add_learning(decides)


def _add_learning(parser: argparse.ArgumentParser) -> None:
    rules = parser.add_mutually_exclusive_group()
    rules.add_argument("--policy", metavar="YAML", help="budgets of forgetting, sources, contradictions")
    rules.add_argument("--no-policy", action="store_true", help="check nothing, whatever policy.yaml says")
    add_training(parser)


def stream(args: argparse.Namespace) -> None:
    """Run `stream`."""
    options = _options(args)
    from sparsemem.study.stream import stream as learn_stream

    counts: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt) if args.follow else contextlib.nullcontext():
        counts = learn_stream(
            args.folder,
            args.source,
            batch_size=args.batch_size,
            propose=args.propose,
            follow=args.follow,
            **options,
        )
    _finish(args, counts)


def approve(args: argparse.Namespace) -> None:
    """Run `approve`."""
    options = _options(args)
    from sparsemem.study.history import open_history
    from sparsemem.study.stream import approve as learn_approved

    open_history(args.folder)
    _finish(args, learn_approved(args.folder, args.facts, **options))


def reject(args: argparse.Namespace) -> None:
    """Run `reject`."""
    from sparsemem.store import proposals
    from sparsemem.study.history import open_history

    store = open_history(args.folder)
    rows = proposals.waiting(store, args.facts)
    proposals.decide(store, rows, proposals.REJECTED)
    if args.json:
        console.emit_json({"rejected": [row["sha"] for row in rows]})
    else:
        console.say(f"rejected {len(rows)} facts")


def show_review(args: argparse.Namespace) -> None:
    """Run `review`."""
    from sparsemem.store import proposals
    from sparsemem.study.history import open_history

    statuses = () if args.all else (proposals.PENDING, proposals.REFUSED)
    rows = proposals.listed(open_history(args.folder), *statuses)
    if args.json:
        console.emit_json({"facts": rows})
    elif rows:
        shown = [
            (row["sha"], row["status"], _text(row["fact"]), row["source"], row["author"], row["reason"])
            for row in rows
        ]
        console.table("", ("sha", "status", "fact", "source", "author", "reason"), shown)
    else:
        console.say("nothing waits for review")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    config = config_from(args, FinetuneConfig)
    from pathlib import Path

    from sparsemem.study.policy import load_policy

    own = Path(args.folder) / "policy.yaml"
    path = None if args.no_policy else args.policy or (own if own.is_file() else None)
    return {
        "probes": args.probes,
        "config": config,
        "background": args.background,
        "policy": load_policy(path) if path else None,
        "prompt": args.prompt,
        "on_update": _say_update,
        "loading": config_from(args, LoadConfig),
    }


def _say_update(report: dict[str, Any]) -> None:
    if "refused" in report:
        return
    facts = report["facts"]
    f1 = facts["seen_f1"] if facts["heldout_f1"] is None else facts["heldout_f1"]
    parts = [] if f1 is None else [f"F1 {f1:.3f}"]
    parts += [f"{name} {probe['forgetting']:+z.1%} forgotten" for name, probe in report["probes"].items()]
    if report.get("earlier", {}).get("f1") is not None:
        parts.append(f"{report['earlier']['num']} earlier facts F1 {report['earlier']['f1']:.3f}")
    console.say(f"update {report['update']} ({report['commit'][:10]}): {', '.join(parts)}")


def _finish(args: argparse.Namespace, counts: dict[str, Any]) -> None:
    if args.json:
        console.emit_json(counts)
    elif counts:
        console.say(", ".join(f"{number} {name}" for name, number in counts.items()))
    else:
        console.say("stopped; everything committed stays")


def _text(fact: dict[str, Any]) -> str:
    from sparsemem.store.merge import describe

    return f"{describe(fact)} {fact.get('answer', '')}".strip()
