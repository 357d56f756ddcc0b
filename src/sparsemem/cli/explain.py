"""explain."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.cli.options import add_folder_command, add_loading, config_from
from sparsemem.config import LoadConfig

STYLES = ("bold green", "bold cyan", "bold magenta", "bold yellow", "bold blue", "bold red")
"""One per update, over and over; its number stands beside the token too."""


def add_explain(commands: Any) -> None:
    """Add `explain`."""
    parser = add_folder_command(
        commands,
        "explain",
        "show which learned slots the tokens of a text read, and what each update changes in what comes next",
        'sparsemem explain smol "Who composed Norway Waltz?" --question --html waltz.html',
        explain,
    )
    parser.add_argument("text", metavar="TEXT", help="what to explain")
    parser.add_argument("--question", action="store_true", help="ask TEXT in the prompt that ask uses")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N",
        help="next tokens to show, and updates to leave out, the most read first (default: 5)",
    )  # fmt: skip
    parser.add_argument(
        "--facts", metavar="FACTS", help="what was taught, for updates that do not keep it themselves"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too")
    add_loading(parser)


def explain(args: argparse.Namespace) -> None:
    """Run `explain`."""
    from sparsemem.study.explain import explain_folder

    result = explain_folder(
        args.folder,
        args.text,
        question=args.question,
        facts=args.facts,
        top=args.top,
        loading=config_from(args, LoadConfig),
    )
    if args.html:
        _write_page(args.html, result)
    if args.json:
        console.emit_json(result)
    else:
        _show(result)


def _write_page(path: Path, result: Mapping[str, Any]) -> None:
    from sparsemem.files import write_atomically
    from sparsemem.study.explain_page import page

    write_atomically(path, lambda temporary: temporary.write_text(page(result), encoding="utf-8"))
    console.say(f"wrote {path}")


def _show(result: Mapping[str, Any]) -> None:
    from sparsemem.study.explain_page import tables, verdict

    console.say_parts(_coloured(result))
    for title, columns, rows in tables(result):
        if rows:
            console.table(title, columns, rows)
    console.say(verdict(result), style="bold")


def _coloured(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield pieces of the text with a style each; a token that fires has its update behind it."""
    from sparsemem.study.explain_page import main_update, printable

    styles: dict[str, str] = {}
    for token in result["tokens"]:
        text = "\n".join(map(printable, token["text"].split("\n")))
        if not token["fires"]:
            yield text, ""
            continue
        update = main_update(token)
        style = styles.setdefault(update, STYLES[len(styles) % len(STYLES)])
        yield text, style
        yield f"[{update}]", "dim"
