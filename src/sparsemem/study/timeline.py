"""Learning and forgetting over the updates of a history, as rows, CSV and Prometheus text."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from sparsemem.store.history import DeltaStore

METRICS = ("number", "commit", "time", "message", "num_slots", "num_facts", "heldout_f1", "seen_f1")


def metrics_rows(store: DeltaStore, revision: str = "HEAD") -> list[dict[str, Any]]:
    """What each version learned and forgot, the oldest first: one row of numbers a commit.

    Columns are `METRICS` and, by probe, `before.NAME`, `after.NAME` and `kept.NAME`.
    """
    rows = []
    for number, commit in enumerate(reversed(store.log(revision)), 1):
        details = store.details(commit.id)
        report = details.get("report", {})
        facts = report.get("facts", {})
        row = {
            "number": number,
            "commit": commit.id[:10],
            "time": commit.time,
            "message": commit.message,
            "num_slots": commit.num_slots,
            "num_facts": len(details.get("facts", ())),
            "heldout_f1": facts.get("heldout_f1"),
            "seen_f1": facts.get("seen_f1"),
        }
        for name, probe in report.get("probes", {}).items():
            row |= {f"before.{name}": probe["before"], f"after.{name}": probe["after"]}
            row |= {f"kept.{name}": probe["retention"]} if probe.get("retention") is not None else {}
        rows.append(row)
    return rows


def first_scores(store: DeltaStore) -> dict[str, float]:
    """Scores of probes before anything was learned: those of the first update that measured each."""
    scores: dict[str, float] = {}
    for commit in reversed(store.log()):
        for name, probe in store.details(commit.id).get("report", {}).get("probes", {}).items():
            scores.setdefault(name, probe["before"])
    return scores


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as CSV, with all columns that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) or list(METRICS)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def as_prometheus(rows: Sequence[dict[str, Any]]) -> str:
    """Write the newest row as Prometheus text: what to scrape of a memory that keeps learning."""
    newest = rows[-1] if rows else {}
    lines = [_gauge("sparsemem_updates", "Updates in the history.", {"": len(rows)})]
    for name, help_text in (
        ("num_facts", "Facts the last update taught."),
        ("num_slots", "Slots the last update changed."),
        ("heldout_f1", "F1 of its facts in wordings never trained on."),
        ("seen_f1", "F1 of its facts in the wording trained on."),
    ):
        if newest.get(name) is not None:
            lines.append(_gauge(f"sparsemem_last_{name}", help_text, {"": newest[name]}))
    for kind, help_text in (
        ("after", "Score of a probe after the last update."),
        ("kept", "Share of the answers right before that still are."),
    ):
        of_kind = {n.partition(".")[2]: v for n, v in newest.items() if n.startswith(f"{kind}.")}
        if of_kind:
            lines.append(_gauge(f"sparsemem_probe_{kind}", help_text, of_kind))
    return "\n".join(lines)


def _gauge(name: str, help_text: str, values: dict[str, Any]) -> str:
    def label(probe: str) -> str:
        escaped = probe.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        return f'{{probe="{escaped}"}}' if probe else ""

    samples = [f"{name}{label(probe)} {value}" for probe, value in values.items()]
    return "\n".join([f"# HELP {name} {help_text}", f"# TYPE {name} gauge", *samples])
