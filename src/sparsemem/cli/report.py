"""report."""

import argparse
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.cli.model import add_prompt
from sparsemem.cli.options import add_folder_command, add_loading, config_from
from sparsemem.config import LoadConfig


def add_report(commands: Any) -> None:
    """Add `report`."""
    parser = add_folder_command(
        commands,
        "report",
        "write one HTML file that shows what was learned, what it cost and how full the memory is",
        "sparsemem report smol --out smol.html --compared compared",
        report,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE",
        help="the file to write (default: report.html)",
    )  # fmt: skip
    parser.add_argument("--compared", metavar="RESULTS", help="folder made by compare, to plot its methods")
    parser.add_argument("--stream", metavar="FILE", help="result of experiments/stream with a recall matrix")
    parser.add_argument("--questions", metavar="PATH", help="questions to ask beside those of the facts")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="TEXT",
        help="texts to draw slot by slot (default: questions of the first facts)",
    )  # fmt: skip
    parser.add_argument(
        "--max-questions", type=int, default=200, metavar="N", help="questions to ask (default: 200)"
    )
    parser.add_argument(
        "--no-answers", action="store_true", help="ask nothing and draw no slots: no model is loaded"
    )
    add_prompt(parser)
    add_loading(parser)


def report(args: argparse.Namespace) -> None:
    """Run `report`."""
    from sparsemem.files import write_atomically
    from sparsemem.study.report import report_folder
    from sparsemem.study.report_page import page

    result = report_folder(
        args.folder,
        compared=args.compared,
        stream=args.stream,
        questions=args.questions,
        texts=args.text,
        answers=not args.no_answers,
        max_questions=args.max_questions,
        prompt=args.prompt,
        loading=config_from(args, LoadConfig),
    )
    text = page(result)
    write_atomically(args.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if args.json:
        console.emit_json({"out": str(args.out), **result})
    else:
        console.say(f"wrote {args.out}")
