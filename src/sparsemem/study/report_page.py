"""A report as a page: one HTML file with a few lines of script for the search; nothing is fetched."""

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from sparsemem.slots.capacity import MAX_HUB_SHARE, MAX_SHARED_FRACTION, MAX_TAKEN
from sparsemem.study import charts
from sparsemem.study.charts import Axis, Series, chart
from sparsemem.study.document import document, escaped, scrolling, table
from sparsemem.study.explain_page import marked, printable, tables, verdict
from sparsemem.study.figures import front
from sparsemem.study.table import NOTHING

UNSHOWN = ("commit", "time", "message")
"""Columns of `metrics_rows` that the table of updates has already."""

SCORES = {"number": "update", "heldout_f1": "held-out F1", "seen_f1": "trained F1"}

MAX_COLUMNS = 120
"""Slots a heatmap shows at most: those that are read with the most weight."""


def page(result: Mapping[str, Any]) -> str:
    """Write what `report_folder` returned as a page; every text in it is escaped."""
    shown = [(title, body) for title, write in SECTIONS if (body := write(result))]
    links = "".join(
        f'<li><a href="#part-{n}">{escaped(title)}</a></li>' for n, (title, _) in enumerate(shown)
    )
    parts = "".join(
        f'<section id="part-{number}" aria-labelledby="title-{number}">\n'
        f'<h2 id="title-{number}">{escaped(title)}</h2>\n{body}\n</section>\n'
        for number, (title, body) in enumerate(shown)
    )
    title = f"What {result['folder']} has learned"
    body = (
        f"<header>\n<h1>{escaped(title)}</h1>\n<p>{escaped(_summary(result))}</p>\n</header>\n"
        f'<nav aria-label="Parts of this report"><ul>{links}</ul></nav>\n<main>\n{parts}</main>'
    )
    style, script = (
        (files("sparsemem.study") / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    return document(title, body, style=charts.STYLE + style, script=script)


def _summary(result: Mapping[str, Any]) -> str:
    updates = result["updates"]
    if not updates:
        return "Nothing yet: this is the memory as attached, before any update."
    num_facts = sum(len(update["facts"]) for update in updates)
    return (
        f"{_counted(len(updates), 'update')} taught {_counted(num_facts, 'fact')}, from "
        f"{_time(updates[0]['time'])} to {_time(updates[-1]['time'])}."
    )


def _learned(result: Mapping[str, Any]) -> str:
    columns = ("update", "what it is", "author", "time", "slots", "bytes", "facts")
    rows = []
    for update in result["updates"]:
        cells = [
            _cell(f"{update['number']}", "number"),
            _cell(f"{printable(update['message']) or NOTHING} ({update['id'][:10]})"),
            _cell(printable(update["author"])),
            f'<td><time datetime="{escaped(update["time"])}">{escaped(_time(update["time"]))}</time></td>',
            _cell(f"{update['num_slots']:,}", "number"),
            _cell(f"{update['bytes']:,}", "number"),
            f"<td>{_facts(update)}</td>",
        ]
        rows.append(cells)
    return _markup_table("updates", columns, rows) if rows else ""


def _facts(update: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escaped(printable(fact))}</li>" for fact in update["facts"])
    taken = f"<p>{_counted(update['num_forgets'], 'fact')} taken back</p>" if update["num_forgets"] else ""
    if not items:
        return taken or NOTHING
    title = _counted(len(update["facts"]), "fact")
    return f'<details><summary>{title}</summary><ul class="facts">{items}</ul></details>{taken}'


def _timeline(result: Mapping[str, Any]) -> str:
    rows = result["timeline"]
    if not rows:
        return ""
    numbers = [row["number"] for row in rows]
    learning = [
        Series(name, [(row["number"], row[key]) for row in rows])
        for name, key in (("held-out wordings", "heldout_f1"), ("trained wording", "seen_f1"))
        if any(row[key] is not None for row in rows)
    ]
    probes = dict.fromkeys(name for row in result["forgetting"] for name in row)
    forgetting = [
        Series(
            printable(name),
            [(n, row.get(name)) for n, row in zip(numbers, result["forgetting"], strict=True)],
        )
        for name in probes
    ]
    across = Axis("update", whole=True)
    drawn = []
    if learning:
        title = "Learning: what each update's facts are answered with right after it"
        drawn.append(chart(title, across, Axis("F1 of the facts", low=0, high=1), learning))
    if forgetting:
        title = "Forgetting: how much worse each probe is than before the first update that measured it"
        values = [value for row in result["forgetting"] for value in row.values()]
        up = Axis("relative loss", low=min(0, *values), high=max(0.01, *values))
        drawn.append(chart(title, across, up, forgetting))
    scores = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in UNSHOWN]
    lost = [f"{printable(name)} forgotten" for name in probes]
    body = [
        [*(_number(row.get(name)) for name in scores), *(_percent(losses.get(name)) for name in probes)]
        for row, losses in zip(rows, result["forgetting"], strict=True)
    ]
    return f'<div class="pair">{"".join(drawn)}</div>\n' + table(
        "the same in numbers: before and after the update, and the share of right answers kept",
        [*map(_score_title, scores), *lost],
        body,
    )


def _score_title(name: str) -> str:
    """Name a column of `metrics_rows` so that it folds: the probe first, then when."""
    when, _, probe = name.partition(".")
    return f"{printable(probe)} {when}" if probe else SCORES.get(name, name.replace("num_", ""))


def _recall(result: Mapping[str, Any]) -> str:
    found = result["recall"]
    if not found:
        return ""
    matrix = found["matrix"]
    columns = ["after update", *(f"facts of {number + 1}" for number in range(len(matrix)))]
    rows = [
        [
            f'<th scope="row">{number}</th>',
            *(
                f'<td class="heat" style="--strength: {0.6 * min(1, max(0, value)):.2f}">{value:.2f}</td>'
                for value in row
            ),
            *["<td></td>"] * (len(matrix) - len(row)),
        ]
        for number, row in enumerate(matrix, 1)
    ]
    title = f"{printable(str(found['method']))}: F1 of the facts of each update, asked after each later one"
    return _markup_table(title, columns, rows) + f'<p class="note">From {escaped(found["file"])}.</p>'


def _compared(result: Mapping[str, Any]) -> str:
    found = result["compared"]
    if not found:
        return ""
    right = max(x for points in found["points"].values() for x, _ in points)
    series = []
    for method, points in found["points"].items():
        best = front([(x, y) for x, y in points])
        steps = [(x, y) for at, (x, y) in enumerate(best) for x, y in ((x, best[max(0, at - 1)][1]), (x, y))]
        series.append(Series(printable(method), points, line=[*steps, (right, best[-1][1])]))
    across, up = (printable(found[name]) for name in ("across", "up"))
    title = f"A point per run, and the best of each method. Across: {across}. Up: {up}"
    drawn = chart(title, Axis("forgetting"), Axis("learning (F1)", low=0, high=1), series)
    rows = [[printable(cell) for cell in row] for row in found["rows"]]
    note = f'<p class="note">From the results in {escaped(printable(found["folder"]))}.</p>'
    return drawn + table("methods, each at its best setting", found["columns"], rows) + note


def _capacity(result: Mapping[str, Any]) -> str:
    plan = result["capacity"]
    parts = [
        f"<p>Recommendation: <strong>{escaped(plan['recommendation'])}</strong>; "
        f"{escaped(plan['reason'])}.</p>"
    ]
    for name, pool in plan["pools"].items():
        shared = pool["num_shared"] / max(1, pool["num_written"])
        rows = [
            _gauge(f"slots written: {pool['num_written']:,} of {pool['num_slots']:,}", pool["fill"], 1),
            _gauge("a new fact's slots that are taken, by the capacity law", pool["taken"], MAX_TAKEN),
            _gauge("written slots wanted by more than one update", shared, MAX_SHARED_FRACTION),
            _gauge("reads of ordinary text in the top 1 % of slots", pool["hub_share"], MAX_HUB_SHARE),
            _gauge("reads of ordinary text that find a written slot", pool["hit_share"], 1),
        ]
        parts.append(_markup_table(printable(name), ("", "share", "limit", ""), rows))
    # Updates are counted by themselves: the history's file grows and shrinks while it is only read.
    of_parts = {name: plan["disk_bytes"].get(name, 0) for name in ("memory", "base", "usage")}
    of_parts["updates"] = sum(update["bytes"] for update in result["updates"])
    sizes = ", ".join(f"{name} {number:,}" for name, number in of_parts.items() if number)
    return "".join(parts) + f'<p class="note">Bytes on disk: {sizes}. The limits are rules of thumb.</p>'


def _gauge(what: str, share: float, limit: float) -> list[str]:
    meter = (
        f'<meter min="0" max="1" high="{limit:g}" value="{share:.6g}" aria-label="{escaped(what)}">'
        f"{share:.2%}</meter>"
    )
    return [
        f'<th scope="row">{escaped(what)}</th>',
        _cell(f"{share:.2%}", "number"),
        _cell(f"{limit:.0%}" if limit < 1 else NOTHING, "number"),
        f"<td>{meter}</td>",
    ]


def _answers(result: Mapping[str, Any]) -> str:
    found = result["answers"]
    if not found:
        return '<p class="note">Not asked: the report was made with --no-answers, without the model.</p>'
    if not found["rows"]:
        return '<p class="note">The history keeps no fact with a question.</p>'
    means = "; ".join(
        f"{wording} wordings {mean['f1_before']:.3f} before, {mean['f1_after']:.3f} after"
        for wording, mean in found["means"].items()
    )
    left_out = (
        f" {_counted(found['num_left_out'], 'more question')} not asked (--max-questions)."
        if found["num_left_out"]
        else ""
    )
    names = ("question", "wording", "right", "as attached", "now", "F1")
    rows = []
    for row in found["rows"]:
        values = (
            row["question"], row["wording"], row["right"][0] if row["right"] else NOTHING, row["before"],
            row["after"], f"{row['f1_before']:.2f} \u2192 {row['f1_after']:.2f}",
        )  # fmt: skip
        rows.append(
            [
                f'<td role="cell" data-name="{name}">{escaped(printable(value)) or NOTHING}</td>'
                for name, value in zip(names, values, strict=True)
            ]
        )
    shown = _markup_table("answers before and after all updates", names, rows, identity="answers-table")
    return (
        f"<p>Mean F1: {escaped(means)}.{left_out}</p>\n"
        '<p class="search" hidden><label for="search">Search the answers</label><br>'
        '<input type="search" id="search" aria-describedby="found" autocomplete="off"> '
        f'<span id="found" role="status">{len(rows)} of {len(rows)} shown</span></p>\n{shown}'
    )


def _heatmaps(result: Mapping[str, Any]) -> str:
    return "\n".join(_heatmap(one) for one in result["heatmaps"] or ())


def _heatmap(explained: Mapping[str, Any]) -> str:
    """Draw tokens by the written slots they read; what fires stands in the text and in a table too."""
    weights: dict[tuple[str, int], float] = {}
    for token in explained["tokens"]:
        for slot in token["slots"]:
            key = (slot["pool"], slot["slot"])
            weights[key] = weights.get(key, 0.0) + slot["share"]
    kept = set(sorted(weights, key=lambda key: -weights[key])[:MAX_COLUMNS])
    columns = {key: place for place, key in enumerate(key for key in weights if key in kept)}
    asked = explained["text"].partition("\nAnswer:")[0].removeprefix("Question: ")
    parts = [
        f"<h3>{escaped(printable(asked))}</h3>",
        marked(explained["tokens"]),
    ]
    if columns:
        names = [printable(token["text"]) for token in explained["tokens"]]
        marks = _cells(explained, columns)
        left_out = f" {len(weights) - len(columns):,} more slots are read with less weight." * (
            len(weights) > len(columns)
        )
        desc = f"{len(names)} tokens by {len(columns)} written slots they read.{left_out}"
        title = f"Slots read in: {printable(asked)}"
        parts.append(scrolling(charts.cells(title, desc, names, len(columns), marks), title))
        parts.append(f'<p class="note">{escaped(desc)} Point at a cell to see the slot.</p>')
    parts.append(f"<p>{escaped(verdict(explained))}</p>")
    firing = tables(explained)[0]
    if firing[2]:
        parts.append(f"<details><summary>{escaped(firing[0])}</summary>{table(*firing)}</details>")
    return "\n".join(parts)


def _cells(
    explained: Mapping[str, Any], columns: Mapping[tuple[str, int], int]
) -> list[tuple[int, int, float, str]]:
    """Make a cell of each token and slot; several heads of a token may read one slot."""
    found: dict[tuple[int, int], tuple[float, str]] = {}
    for row, token in enumerate(explained["tokens"]):
        for slot in token["slots"]:
            if (place := columns.get((slot["pool"], slot["slot"]))) is not None:
                share = slot["share"] + found.get((row, place), (0.0, ""))[0]
                found[row, place] = share, _cell_label(token, slot, share, explained["num_documents"])
    most = max(share for share, _ in found.values())
    return [(row, place, share / most, label) for (row, place), (share, label) in found.items()]


def _cell_label(token: Mapping[str, Any], slot: Mapping[str, Any], share: float, num_documents: int) -> str:
    update = f"update {slot['update']}" if slot["update"] else "before all updates"
    fact = printable(slot["fact"] or "fact unknown")
    return (
        f"{printable(token['text'])}: slot {slot['slot']} of {slot['pool']}, {share:.1%} of the reads, "
        f"{update}, {fact}; read by {slot['document_frequency']} of {num_documents} ordinary documents"
    )


def _provenance(result: Mapping[str, Any]) -> str:
    origin = result["provenance"]
    here = origin["report"]
    source = f"{here['commit'][:10]}{' and changes' if here['dirty'] else ''}" if here["commit"] else NOTHING
    asked = f"as {origin['prompt']}, greedily" if origin["prompt"] else NOTHING
    rows = [
        ("version", origin["head"] or "as attached"),
        ("branch", origin["branch"]),
        ("date of the last update", origin["time"] or NOTHING),
        ("base model", origin["base_model"]),
        ("its fingerprint", origin["base_fingerprint"]),
        ("questions asked", asked),
        *(("learned with", _pairs(versions)) for versions in origin["learned_with"]),
        ("this report", _pairs(here["versions"])),
        ("source tree of this report", source),
        ("memory", _pairs(origin["memory"])),
        ("config of the last update", _pairs(origin["config"]) or NOTHING),
    ]
    body = [[f'<th scope="row">{escaped(name)}</th>', _cell(printable(value))] for name, value in rows]
    return (
        "<p>Scores and probes were measured when each update was made and are kept in its commit; answers, "
        "slots and capacity were found when this report was made.</p>"
        + _markup_table("where these numbers come from", ("", ""), body)
    )


SECTIONS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("What was learned, and when", _learned),
    ("Learning against forgetting", _timeline),
    ("What is left of each update", _recall),
    ("Against other methods", _compared),
    ("How full the memory is", _capacity),
    ("Answers before and after", _answers),
    ("Which slots are read", _heatmaps),
    ("Provenance", _provenance),
)


def _markup_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], identity: str = ""
) -> str:
    """Write a table whose cells are markup already.

    Roles are said once more: what the style turns into cards on a phone is no table to a reader else.
    """
    heads = "".join(
        f'<th scope="col" role="columnheader">{escaped(column)}</th>' if column else "<td></td>"
        for column in columns
    )
    head = f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>' if any(columns) else ""
    body = "".join(f'<tr role="row">{"".join(row)}</tr>\n' for row in rows)
    named = f' id="{identity}"' if identity else ""
    return scrolling(
        f'<table role="table"{named}>\n<caption>{escaped(title)}</caption>\n{head}\n'
        f'<tbody role="rowgroup">\n{body}</tbody>\n</table>',
        title,
    )


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escaped(text)}</td>' if kind else f"<td>{escaped(text)}</td>"


def _number(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _time(iso: str) -> str:
    """Write a commit's time, which is UTC, to the minute."""
    return f"{iso[:10]} {iso[11:16]} UTC" if iso.endswith("+00:00") else iso


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+z.2%}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
