"""log, show, diff, revert, checkout, branch, tag, merge, cherry-pick, gc, verify, export, import."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemem import console
from sparsemem.cli.model import add_prompt
from sparsemem.cli.options import add_folder_command, add_loading, config_from
from sparsemem.cli.tables import number, size
from sparsemem.config import LoadConfig

if TYPE_CHECKING:
    from sparsemem.store.merge import Side


def add_history(commands: Any) -> None:
    """Add all commands of the history."""
    _add_views(commands)
    _add_changes(commands)
    _add_names(commands)
    _add_files(commands)


def _add_views(commands: Any) -> None:
    log = add_folder_command(commands, "log", "list what was learned", "sparsemem log smol", show_log)
    log.add_argument("revision", nargs="?", default="HEAD", metavar="REV", help="from where (default: HEAD)")
    form = log.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="learning and forgetting per update, as CSV")
    form.add_argument(
        "--prometheus", action="store_true", help="the same of the last one, as Prometheus text"
    )
    form.add_argument("--journal", action="store_true", help="everything ever done to branches and tags")

    one = add_folder_command(
        commands, "show", "describe one update", "sparsemem show smol HEAD~1", show_commit
    )
    one.add_argument("revision", nargs="?", default="HEAD", metavar="REV", help="which (default: HEAD)")

    two = add_folder_command(
        commands,
        "diff",
        "say how two versions differ",
        "sparsemem diff smol attached HEAD --questions questions.jsonl",
        show_diff,
    )
    two.add_argument("old", metavar="A", help="a version")
    two.add_argument("new", metavar="B", help="another")
    two.add_argument("--questions", metavar="PATH", help="questions to ask both versions")
    add_prompt(two)
    add_loading(two, "model, for --questions")


def _add_changes(commands: Any) -> None:
    for name, summary, example, run in (
        ("revert", "take one update back, wherever in the history it is", "sparsemem revert smol 3", revert),
        (
            "cherry-pick",
            "take one update of another branch",
            "sparsemem cherry-pick smol team-b",
            cherry_pick,
        ),
        ("merge", "take all that was learned on another branch", "sparsemem merge smol team-b", merge),
    ):
        joins = add_folder_command(commands, name, summary, example, run)
        joins.add_argument("revision", metavar="REV", help="which")
        joins.add_argument("-m", "--message", default="", metavar="TEXT", help="what this is")
        how = joins.add_mutually_exclusive_group()
        how.add_argument("--ours", action="store_true", help="leave slots in conflict as they are")
        how.add_argument("--theirs", action="store_true", help="change them, and damage the facts at stake")
        how.add_argument("--relearn", action="store_true", help="change them, and teach these facts again")
        add_loading(joins, "model, for --relearn")


def _add_names(commands: Any) -> None:
    checkout = add_folder_command(
        commands, "checkout", "go to another version or branch", "sparsemem checkout smol HEAD~1", check_out
    )
    checkout.add_argument("revision", metavar="REV", help='a version, a branch, or "attached"')

    for kind in ("branch", "tag"):
        named = add_folder_command(
            commands,
            kind,
            f"list, make or delete a {kind}",
            f"sparsemem {kind} smol v1.1",
            _ref_command(kind),
        )
        named.add_argument(
            "name", nargs="?", metavar="NAME", help="what to call it; leave it out to list all"
        )
        named.add_argument("revision", nargs="?", default="HEAD", metavar="REV", help="which (default: HEAD)")
        named.add_argument("-d", "--delete", action="store_true", help="delete it; its commits stay until gc")


def _add_files(commands: Any) -> None:
    add_folder_command(commands, "verify", "check every byte of a history", "sparsemem verify smol", verify)
    add_folder_command(
        commands, "gc", "remove what no branch, tag or checkout needs", "sparsemem gc smol", gc
    )

    export = add_folder_command(
        commands, "export", "write versions to one file", "sparsemem export smol smol.zip v1.1", export_
    )
    export.add_argument("file", metavar="FILE", help="the file to write")
    export.add_argument(
        "revisions", nargs="*", metavar="REV", help="versions (default: all branches and tags)"
    )
    from_file = add_folder_command(
        commands, "import", "add the versions of a file", "sparsemem import smol smol.zip", import_
    )
    from_file.add_argument("file", metavar="FILE", help="a file made by export")


def show_log(args: argparse.Namespace) -> None:
    """Run `log`."""
    from sparsemem.study import history, timeline

    store = history.open_history(args.folder)
    if args.journal:
        rows = store.journal()
    elif args.csv or args.prometheus:
        rows = timeline.metrics_rows(store, args.revision)
    else:
        rows = history.log_rows(store, args.revision)
    if args.csv:
        console.emit(timeline.as_csv(rows))
    elif args.prometheus:
        console.emit(timeline.as_prometheus(rows))
    elif args.json:
        console.emit_json({"commits" if not args.journal else "journal": rows})
    elif args.journal:
        names = ("time", "author", "action", "ref", "before", "after")
        shown = [[str(row[name] or "")[:25] for name in names] for row in rows]
        console.table("", names, shown)
    elif rows:
        lines = [
            (
                str(row["number"]),
                row["id"][:10],
                row["time"],
                row["author"],
                str(row["num_slots"]),
                ", ".join(row["refs"]),
                row["message"],
            )
            for row in rows
        ]
        console.table("", ("", "commit", "time", "author", "slots", "names", "message"), lines)
    else:
        console.say(
            f"{args.folder} has learned nothing yet; teach it with: sparsemem learn {args.folder} FACTS"
        )


def show_commit(args: argparse.Namespace) -> None:
    """Run `show`."""
    from sparsemem.study import history

    shown = history.show(history.open_history(args.folder), args.revision)
    if args.json:
        return console.emit_json(shown)
    for name in ("id", "parent", "second_parent", "time", "author", "message", "digest", "num_slots"):
        if shown[name] not in (None, ""):
            console.say(f"{name:14} {shown[name]}")
    report = shown.get("report", {})
    facts = report.get("facts", {})
    if facts:
        console.say(f"{'held-out F1':14} {_arrow(facts['before'], facts, 'heldout_f1')}")
    for name, probe in report.get("probes", {}).items():
        console.say(f"{name:14} {number(probe['before'])} -> {number(probe['after'])} ({probe['metric']})")
    _say_facts("taught", shown.get("facts", []))


def show_diff(args: argparse.Namespace) -> None:
    """Run `diff`."""
    from sparsemem.study import history

    store = history.open_history(args.folder)
    found = history.diff(
        store,
        args.old,
        args.new,
        questions=args.questions,
        prompt=args.prompt,
        loading=config_from(args, LoadConfig),
    )
    if args.json:
        return console.emit_json(found)
    console.say(f"{found['num_slots']:,} slots differ")
    _say_facts("gained", found["gained"])
    _say_facts("lost", found["lost"])
    for name, value in found["probes"]["new"].items():
        old = found["probes"]["old"].get(name)
        console.say(f"{name:14} {number(old) if old is not None else 'not measured'} -> {number(value)}")
    if "answers" in found:
        rows = [(row["question"], row["old"], row["new"]) for row in found["answers"]]
        console.table(f"{len(rows)} answers differ", ("question", args.old, args.new), rows)


def revert(args: argparse.Namespace) -> None:
    """Run `revert`."""
    from sparsemem.store import merge as merges

    _settle(args, merges.revert, "revert")


def cherry_pick(args: argparse.Namespace) -> None:
    """Run `cherry-pick`."""
    from sparsemem.store import merge as merges

    _settle(args, merges.cherry_pick, "cherry-pick")


def merge(args: argparse.Namespace) -> None:
    """Run `merge`."""
    from sparsemem.store import merge as merges
    from sparsemem.study.history import open_history

    store = open_history(args.folder)
    if merges.can_fast_forward(store, args.revision) and store.resolve(args.revision) != store.head():
        target = store.resolve(args.revision)
        assert target is not None
        store.move_head(target, "merge")
        return _done(
            args, {"commit": {"id": target}, "fast_forward": True}, f"now at {target[:10]}, fast-forward"
        )
    _settle(args, merges.merge, "merge")


def _settle(args: argparse.Namespace, find: Any, action: str) -> None:
    from sparsemem.study import history

    store = history.open_history(args.folder)
    change = find(store, args.revision)
    if change is None:
        return _done(args, {"commit": None}, f"all of {args.revision} is here already; nothing to do")
    side: Side | None = "ours" if args.ours else "theirs" if args.theirs else None
    message = args.message or f"{action} {args.revision}"
    done = history.settle(
        store,
        change,
        message=message,
        action=action,
        side=side,
        relearn=args.relearn,
        loading=config_from(args, LoadConfig),
    )
    commit = done["commit"]
    again = f"; {len(done['relearned'])} facts taught again" if done["relearned"] else ""
    _done(args, done, f"{action}: commit {commit['id'][:10]} changes {commit['num_slots']} slots{again}")


def check_out(args: argparse.Namespace) -> None:
    """Run `checkout`."""
    from sparsemem.study.history import open_history

    store = open_history(args.folder)
    target = store.checkout(args.revision)
    _done(args, {"head": store.head_name(), "commit": target}, f"{args.folder} is at {args.revision}")


def _ref_command(kind: str) -> Any:
    def run(args: argparse.Namespace) -> None:
        from sparsemem.study.history import open_history

        store = open_history(args.folder)
        if args.name is None:
            refs, head = store.refs(kind), store.head_name()
            if args.json:
                return console.emit_json({"refs": refs, "head": head})
            for name, target in refs.items():
                console.say(f"{'*' if name == head else ' '} {name:24} {target[:10]}")
            return None
        if args.delete:
            store.delete_ref(kind, args.name)
            return _done(args, {"deleted": args.name}, f"deleted {kind} {args.name}")
        target = store.create_ref(kind, args.name, args.revision)
        return _done(args, {"name": args.name, "commit": target}, f"{kind} {args.name} is {target[:10]}")

    return run


def verify(args: argparse.Namespace) -> int:
    """Run `verify`."""
    from sparsemem.store.integrity import verify as check
    from sparsemem.study.history import open_history

    problems = check(open_history(args.folder))
    if args.json:
        console.emit_json({"problems": problems})
    for problem in problems:
        console.say(problem, style="red")
    if not problems:
        console.say(f"{args.folder} is sound")
    return 1 if problems else 0


def gc(args: argparse.Namespace) -> None:
    """Run `gc`."""
    import dataclasses

    from sparsemem.store.integrity import gc as collect
    from sparsemem.study.history import open_history

    gone = collect(open_history(args.folder))
    _done(args, dataclasses.asdict(gone), f"removed {gone.num_commits} commits, {size(gone.num_bytes)}")


def export_(args: argparse.Namespace) -> None:
    """Run `export`."""
    from sparsemem.store.archive import export
    from sparsemem.study.history import open_history

    num = export(open_history(args.folder), Path(args.file), args.revisions)
    _done(args, {"num_commits": num, "file": args.file}, f"{args.file}: {num} commits")


def import_(args: argparse.Namespace) -> None:
    """Run `import`."""
    from sparsemem.store.archive import import_archive
    from sparsemem.study.history import open_history

    made = import_archive(open_history(args.folder), Path(args.file))
    names = ", ".join(made) or "no branch"
    _done(args, {"branches": made}, f"added {names}; take one with: sparsemem merge {args.folder} NAME")


def _done(args: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    if args.json:
        console.emit_json(values)
    else:
        console.say(text)


def _say_facts(title: str, rows: list[dict[str, Any]]) -> None:
    from sparsemem.store.merge import describe

    for row in rows:
        answer = f" {row['answer']}" if row.get("answer") else ""
        console.say(f"{title:14} {describe(row)}{answer}")


def _arrow(before: dict[str, Any], after: dict[str, Any], name: str) -> str:
    values = (before.get(name), after.get(name))
    return " -> ".join("-" if value is None else number(value) for value in values)
