"""An HTML page that is one file: every text in it is escaped, nothing is fetched."""

import base64
import hashlib
import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --line: #c8c8d0; --dim: #5c5c66;
        --mark: 12 110 180; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --paper: #16161a; --line: #44444e; --dim: #a5a5b0; --mark: 90 180 250; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; font-size: 1.2rem; line-height: 2.2;
        border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
mark { color: inherit; background: rgb(var(--mark) / var(--strength));
       border-bottom: 2px solid rgb(var(--mark)); }
sup { color: var(--dim); }
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; font-weight: bold; padding: .8rem 0 .3rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0;
         text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: var(--dim); }
@media print { :root { color-scheme: light; } }
"""


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Write a whole page.

    Args:
        title: Its title, not escaped yet.
        body: Markup, all texts in it escaped.
        style: More rules, behind `STYLE`.
        script: JavaScript; the policy names it by its hash, so that no other runs.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def escaped(text: object) -> str:
    """Make a text one that stands for itself, between tags and in quoted attributes, of HTML and SVG."""
    return html.escape(str(text), quote=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; columns in which every cell begins with a digit, a sign or a dash are right-aligned."""
    numeric = [_is_numeric([row[place] for row in rows]) for place in range(len(columns))]
    heads = "".join(
        f'<th scope="col"{_class(is_number)}>{escaped(column)}</th>'
        for column, is_number in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_class(is_number)}>{escaped(cell)}</td>"
            for cell, is_number in zip(row, numeric, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return scrolling(
        f"<table>\n<caption>{escaped(title)}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>",
        title,
    )


def scrolling(markup: str, label: str) -> str:
    """Let what is wider than the screen scroll by itself; by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(label)}">{markup}</div>'


def _is_numeric(cells: Sequence[str]) -> bool:
    return any(cell.lstrip("+-")[:1].isdigit() for cell in cells) and all(
        cell[:1].isdigit() or cell[:1] in "+-\u2013" for cell in cells
    )


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _policy(script: str) -> str:
    """Should anything hostile ever get past the escaping, it could neither run nor fetch."""
    if not script:
        return "default-src 'none'; style-src 'unsafe-inline'"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
