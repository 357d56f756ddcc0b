"""An explanation as a page: one HTML file, no script, nothing fetched."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsemem.study.document import document, escaped, table


def page(result: Mapping[str, Any]) -> str:
    """Write what `explain` returned as a page; every text in it is escaped."""
    body = (
        f"<main>\n<h1>What answers here</h1>\n<p>{escaped(verdict(result))}</p>\n{marked(result['tokens'])}\n"
        + "\n".join(table(*shown) for shown in tables(result) if shown[2])
        + "\n</main>"
    )
    return document(f"What was learned for: {result['text']}", body)


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


def marked(tokens: Iterable[Mapping[str, Any]]) -> str:
    """Write a text with the tokens that fire marked, and say what that means."""
    parts = []
    for token in tokens:
        if not token["fires"]:
            parts.append(escaped(token["text"]))
            continue
        update = main_update(token)
        number = f"<sup>{escaped(update)}</sup>" if update else ""
        strength = f"--strength: {0.15 + 0.45 * token['agreement']:.2f}"
        parts.append(f'<mark style="{strength}">{escaped(token["text"])}</mark>{number}')
    return (
        f'<p class="text">{"".join(parts)}</p>\n'
        '<p class="note">Marked tokens get an answer from the memory; the small number is the update that '
        "wrote most of what they read.</p>"
    )
