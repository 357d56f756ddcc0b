"""All there is to show of a memory folder: what was learned and when, what it cost, how full it is."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.config import LoadConfig
from sparsemem.data import load_questions
from sparsemem.errors import ConfigError, DataError
from sparsemem.evaluation.evaluate import answer_tokens
from sparsemem.evaluation.metrics import f1, forgetting, mean_or_none
from sparsemem.evaluation.probes import LOWER_IS_BETTER
from sparsemem.files import read_json
from sparsemem.memory.checkpoint import read_header
from sparsemem.prompts import SHOTS, PromptFormat, check_format, qa_examples, qa_question
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.commits import facts_of
from sparsemem.store.history import ATTACHED, DeltaStore
from sparsemem.store.load import load
from sparsemem.store.merge import describe
from sparsemem.store.state import difference
from sparsemem.study.explain import explain, taught_updates
from sparsemem.study.figures import pareto_points
from sparsemem.study.history import ask_both, log_rows, open_history
from sparsemem.study.plan import plan_stored
from sparsemem.study.provenance import provenance
from sparsemem.study.results import load_results
from sparsemem.study.table import comparison
from sparsemem.study.timeline import first_scores, metrics_rows

NUM_HEATMAPS = 4
"""Facts whose questions are drawn slot by slot if no texts are given."""


def report_folder(
    folder: str | Path,
    *,
    compared: str | Path | None = None,
    stream: str | Path | None = None,
    questions: str | Path | None = None,
    texts: Sequence[str] = (),
    answers: bool = True,
    max_questions: int = 200,
    prompt: PromptFormat = "qa",
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Gather what `report_page.page` shows of a folder, at the version that is checked out.

    Args:
        folder: A memory folder.
        compared: A folder of results, of `compare` or an experiment.
        stream: A result of experiments/stream.
        questions: Questions to ask beside those of the facts.
        texts: Texts to draw slot by slot; by default the questions of the first facts.
        answers: Load the model, ask it, and draw slots; it takes minutes where all else takes seconds.
        max_questions: How many are asked.
        prompt: How.
        loading: Device and precision of the model.

    Returns:
        As plain JSON values: `updates` as in `log`, with facts and bytes; `timeline`, a row of numbers
        each, and `forgetting` of each probe since the first update that measured it; `capacity` as in
        `plan`; `recall`, `compared`, `answers`, `heatmaps`, None of what was not asked for; `provenance`.

    Raises:
        SparsememError: Something given cannot be read or used; found before the model is loaded.
    """
    check_format(prompt)
    if max_questions < 1:
        raise ConfigError(f"max_questions={max_questions} is not positive; leave the questions out instead")
    if not answers and (questions or texts):
        raise ConfigError("questions and texts need the model; leave them out, or ask for answers")
    if any(not text.strip() for text in texts):
        raise DataError("a text to draw is empty; give some words")
    store = open_history(folder)
    rows = _questions(store, questions)
    found = {
        "folder": store.folder.resolve().name,
        "updates": _updates(store),
        "timeline": metrics_rows(store),
        "forgetting": forgetting_rows(store),
        "recall": _recall(Path(stream)) if stream else None,
        "compared": _compared(Path(compared)) if compared else None,
        "capacity": plan_stored(store.folder),
        "answers": None,
        "heatmaps": None,
    }
    if answers:
        found |= _asked(store, rows, texts, max_questions, prompt, loading or LoadConfig())
    return {**found, "provenance": _provenance(store, prompt if answers else None)}


def forgetting_rows(store: DeltaStore) -> list[dict[str, float]]:
    """Forgetting of each probe after each update, since before the first one that measured it.

    Returns:
        A dict a commit, the oldest first, of relative losses (positive is worse) by probe.
    """
    first = first_scores(store)
    rows = []
    for commit in reversed(store.log()):
        row = {}
        for name, probe in store.details(commit.id).get("report", {}).get("probes", {}).items():
            better = probe["metric"] not in LOWER_IS_BETTER
            row[name] = forgetting(first[name], probe["after"], higher_is_better=better)
        rows.append(row)
    return rows


def _updates(store: DeltaStore) -> list[dict[str, Any]]:
    rows = []
    for row in reversed(log_rows(store)):
        details = store.details(row["id"])
        facts = [
            f"{describe(fact)} {fact['answer']}" if fact.get("answer") else describe(fact)
            for fact in details.get("facts", ())
        ]
        size = store.objects.path(row["object"]).stat().st_size
        rows.append({**row, "facts": facts, "num_forgets": len(details.get("forgets", ())), "bytes": size})
    return rows


def _questions(store: DeltaStore, given: str | Path | None) -> list[dict[str, Any]]:
    """List what can be asked: each fact that is known in all its wordings, and the questions given."""
    rows = []
    for fact in facts_of(store.facts(store.head())):
        wordings = [("trained", fact.question), *(("held-out", text) for text in fact.heldout_questions)]
        rows += [
            {"question": text, "wording": wording, "right": list(fact.answers)}
            for wording, text in wordings
            if text
        ]
    asked = load_questions(str(given)) if given else []
    return [
        *({"question": row.question, "wording": "given", "right": list(row.answers)} for row in asked),
        *rows,
    ]


def _asked(
    store: DeltaStore,
    rows: list[dict[str, Any]],
    texts: Sequence[str],
    max_questions: int,
    prompt: PromptFormat,
    loading: LoadConfig,
) -> dict[str, Any]:
    """Load the model once, and ask it before and after all that was learned."""
    asked, facts = rows[:max_questions], facts_of(store.facts(store.head()))
    shown = [(text, "") for text in texts] or [
        (qa_question(fact.question), qa_examples(SHOTS)) for fact in facts if fact.question
    ][:NUM_HEATMAPS]
    if not asked and not shown:
        return {"answers": {"rows": [], "num_left_out": 0}, "heatmaps": []}
    usage, updates = load_usage(store.folder / USAGE_FILE), taught_updates(store.folder)
    with console.progress(f"load {store.folder}"):
        model, tokenizer = load(store.folder, revision=ATTACHED, **loading.options())
    usage.check(model)
    delta = difference(store.state(None), store.state(store.head()))
    replies = ask_both(
        model,
        tokenizer,
        [row["question"] for row in asked],
        delta,
        prompt=prompt,
        max_new_tokens=answer_tokens(tokenizer, facts),
    )
    with console.progress(f"explain {len(shown)} texts") as step:
        heatmaps = []
        for number, (text, before) in enumerate(shown, 1):
            heatmaps.append(explain(model, tokenizer, usage, updates, text, prompt=before, top=1))
            step(number, len(shown))
    return {"answers": _scored(asked, replies, len(rows) - len(asked)), "heatmaps": heatmaps}


def _scored(
    asked: Sequence[Mapping[str, Any]], replies: tuple[list[str], list[str]], num_left_out: int
) -> dict[str, Any]:
    rows = [
        {
            **row,
            "before": old,
            "after": new,
            "f1_before": f1(old, row["right"]),
            "f1_after": f1(new, row["right"]),
        }
        for row, old, new in zip(asked, *replies, strict=True)
    ]
    means = {
        wording: {
            name: mean_or_none([row[name] for row in rows if row["wording"] == wording])
            for name in ("f1_before", "f1_after")
        }
        for wording in dict.fromkeys(row["wording"] for row in rows)
    }
    return {"rows": rows, "num_left_out": num_left_out, "means": means}


def _recall(path: Path) -> dict[str, Any]:
    """Read the recall matrix of a result: row n has the recall of updates 1 to n, after update n."""
    result = read_json(path)
    match result:
        case {"metrics": {"recall": [*matrix]}} if matrix and all(
            map(_is_row, matrix, range(1, 1 + len(matrix)))
        ):
            method = result.get("config", {}).get("method", path.stem)
            return {"method": method, "matrix": matrix, "file": path.name}
    raise DataError(f"{path} has no recall matrix; give a result of experiments/stream/run.py")


def _is_row(row: Any, length: int) -> bool:
    return (
        isinstance(row, list) and len(row) == length and all(isinstance(value, int | float) for value in row)
    )


def _compared(folder: Path) -> dict[str, Any]:
    """Read results; of the folder `compare` made, those in it."""
    results = load_results(folder / "results" if (folder / "results").is_dir() else folder)
    try:
        drawn = pareto_points(results)
        table = comparison(results)
    except KeyError as error:
        raise DataError(f"a result in {folder} has no {error}; give a folder made by compare") from None
    return {
        "points": drawn.points,
        "across": drawn.across,
        "up": drawn.up,
        "columns": table.columns,
        "rows": table.rows,
        "folder": str(folder),
    }


def _provenance(store: DeltaStore, prompt: PromptFormat | None) -> dict[str, Any]:
    """Say what made these numbers; no clock, so that one history gives one page."""
    header, here = read_header(store.folder), provenance()
    head = store.head()
    return {
        "head": head,
        "branch": store.head_name(),
        "time": store.get(head).time if head else None,
        "base_model": header["base_model"],
        "base_fingerprint": header["base_fingerprint"],
        "memory": header["memory"],
        "config": store.details(head).get("config", {}) if head else {},
        "prompt": prompt,
        "learned_with": list(_distinct_versions(store)),
        "report": {name: here[name] for name in ("commit", "dirty", "versions")},
    }


def _distinct_versions(store: DeltaStore) -> Iterator[dict[str, str]]:
    seen = []
    for commit in reversed(store.log()):
        versions = store.details(commit.id).get("versions")
        if versions and versions not in seen:
            seen.append(versions)
            yield versions
