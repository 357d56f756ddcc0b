"""An explanation as a page: one HTML file, no script, nothing fetched."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --line: #c8c8d0; --dim: #5c5c66;
        --mark: 12 110 180; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --paper: #16161a; --line: #44444e; --dim: #a5a5b0; --mark: 90 180 250; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 0 auto; padding: 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.2rem; line-height: 2.2;
        border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
mark { color: inherit; background: rgb(var(--mark) / var(--strength));
       border-bottom: 2px solid rgb(var(--mark)); }
sup { color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
caption { text-align: left; font-weight: bold; padding: .8rem 0 .3rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0;
         text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: var(--dim); }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Should anything hostile ever get past the escaping, it could neither run nor fetch."""


def page(result: Mapping[str, Any]) -> str:
    """Write what `explain` returned as a page; every text in it is escaped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What was learned for: {_text(result['text'])}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>What answers here</h1>\n<p>{_text(verdict(result))}</p>\n"
        f"{_marked(result['tokens'])}\n"
        '<p class="note">Marked tokens get an answer from the memory; the small number is the update that '
        "wrote most of what they read.</p>\n"
        + "\n".join(_table(*shown) for shown in tables(result) if shown[2])
        + "\n</main>\n</body>\n</html>\n"
    )


def verdict(result: Mapping[str, Any]) -> str:
    """Say in a sentence whether anything learned answers."""
    num_accidents = sum(token["num_written"] for token in result["tokens"])
    num_reads = sum(token["num_reads"] for token in result["tokens"])
    changed = f"all that was learned moves the next token's prediction by {result['kl_all']:.2g} nats"
    if result["fires"]:
        return f"Something learned fires here: {changed}."
    return (
        f"Nothing learned fires here: {num_accidents:,} of {num_reads:,} reads find a slot that was "
        f"written, too few at any token to be an answer; {changed}."
    )


Shown = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A table: title, columns, rows of as many cells."""


def tables(result: Mapping[str, Any]) -> list[Shown]:
    """Put an explanation into tables: tokens that fire, updates, and what comes next."""
    updates = result["updates"]
    measured = [update for update in updates if "kl" in update]
    next_rows = [
        (
            printable(token["token"]),
            probability(token["log_prob"]),
            probability(result["log_probs_without_all"][place]),
            *(probability(update["log_probs_without"][place]) for update in measured),
        )
        for place, token in enumerate(result["next"])
    ]
    return [
        (
            "tokens that fire",
            ("token", "agreement", "written reads", "documents that read them", "update", "fact"),
            _without_repeats([_token_row(token, result) for token in result["tokens"] if token["fires"]]),
        ),
        (
            "updates",
            ("update", "what it is", "reads", "left out, moves the prediction by", "facts, by their reads"),
            [_update_row(update) for update in updates],
        ),
        (
            "the next token",
            ("token", "now", "without all", *(f"without {update['update']}" for update in measured)),
            next_rows,
        ),
    ]


def _token_row(token: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    frequencies = sorted(slot["document_frequency"] for slot in token["slots"])
    middle = frequencies[len(frequencies) // 2]
    return (
        printable(token["text"]),
        f"{token['agreement']:.2f}",
        f"{token['num_written']} of {token['num_reads']}",
        f"{middle} of {result['num_documents']}, at most {frequencies[-1]}",
        _most([slot["update"] for slot in token["slots"]], "before all updates"),
        _most([slot["fact"] for slot in token["slots"]], "unknown"),
    )


def _without_repeats(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Name a fact once where several tokens in a row belong to it: it is long."""
    facts = [None, *(row[-1] for row in rows)]
    return [
        (*row[:-1], "as above" if row[-1] == above else row[-1])
        for row, above in zip(rows, facts, strict=False)
    ]


def _update_row(update: Mapping[str, Any]) -> tuple[str, ...]:
    facts = sorted(update["facts"], key=lambda fact: -fact["num_reads"])
    return (
        update["update"],
        printable(update["message"]),
        str(update["num_reads"]),
        f"{update['kl']:.2g} nats" if "kl" in update else "not measured",
        "; ".join(f"{printable(fact['fact'])} ({fact['num_reads']})" for fact in facts) or "unknown",
    )


def main_update(token: Mapping[str, Any]) -> str:
    """Name the update that wrote most of what a token reads; "" if it was there before all of them."""
    return _most([slot["update"] for slot in token["slots"]], "")


def _most(names: Sequence[str | None], nothing: str) -> str:
    most = max(dict.fromkeys(names), key=names.count)
    return nothing if most is None else printable(most)


def probability(log_prob: float) -> str:
    """A probability as a person reads it."""
    return f"{math.exp(log_prob):.2%}"


def printable(text: str) -> str:
    """Show what would not be seen: line ends and controls."""
    return "".join(
        "\u21b5" if letter == "\n" else letter if letter.isprintable() else f"\\x{ord(letter):02x}"
        for letter in text
    )


def _marked(tokens: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for token in tokens:
        if not token["fires"]:
            parts.append(_text(token["text"]))
            continue
        update = main_update(token)
        number = f"<sup>{_text(update)}</sup>" if update else ""
        strength = f"--strength: {0.15 + 0.45 * token['agreement']:.2f}"
        parts.append(f'<mark style="{strength}">{_text(token["text"])}</mark>{number}')
    return f'<p class="text">{"".join(parts)}</p>'


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [all(row[place][:1].isdigit() for row in rows) for place in range(len(columns))]
    heads = "".join(
        f'<th scope="col"{_class(is_number)}>{_text(column)}</th>'
        for column, is_number in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_class(is_number)}>{_text(cell)}</td>" for cell, is_number in zip(row, numeric, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table>\n<caption>{_text(title)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
    )


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _text(text: str) -> str:
    return html.escape(text, quote=True)
