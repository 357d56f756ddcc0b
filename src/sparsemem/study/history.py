"""The history of a folder as people use it: what versions taught, how two differ, how to join them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.config import FinetuneConfig, LoadConfig, from_json, to_json
from sparsemem.data import Fact, load_questions, parse_fact
from sparsemem.errors import HistoryError
from sparsemem.evaluation.generate import answer_questions
from sparsemem.memory.attach import pools
from sparsemem.memory.checkpoint import local_folder, read_header
from sparsemem.memory.delta import SparseDelta
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.commits import Commit, FactRow, fact_text, facts_of
from sparsemem.store.history import ATTACHED, DeltaStore
from sparsemem.store.load import load
from sparsemem.store.merge import Change, Side, commit_change, describe, joined
from sparsemem.store.state import difference
from sparsemem.study.provenance import versions
from sparsemem.training.finetune import finetune


def open_history(folder: str | Path) -> DeltaStore:
    """Open the history of a memory folder; raises as `sparsemem.load` where it is none."""
    folder = local_folder(folder)
    read_header(folder)
    return DeltaStore(folder)


def log_rows(store: DeltaStore, revision: str = "HEAD") -> list[dict[str, Any]]:
    """Describe a version and those before it, the newest first, as plain JSON values."""
    commits = store.log(revision)
    names: dict[str, list[str]] = {}
    for name, target in store.refs().items():
        names.setdefault(target, []).append(name)
    return [
        {"number": len(commits) - place, **dataclasses.asdict(commit), "refs": names.get(commit.id, [])}
        for place, commit in enumerate(commits)
    ]


def show(store: DeltaStore, revision: str = "HEAD") -> dict[str, Any]:
    """Describe one commit with its facts and its report, as plain JSON values."""
    return {**dataclasses.asdict(_commit(store, revision)), **store.details(_commit(store, revision).id)}


def diff(
    store: DeltaStore,
    old: str,
    new: str,
    *,
    questions: str | Path | None = None,
    prompt: PromptFormat = "qa",
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Say how two versions differ.

    Args:
        store: The history.
        old: A revision.
        new: Another.
        questions: Questions to ask both versions.
        prompt: How to ask them.
        loading: Device and precision of the model.

    Returns:
        Facts `gained` and `lost`, `num_slots` that differ, `probes` as they were measured when each version
        was made, and with questions the `answers` that differ; as plain JSON values.
    """
    check_format(prompt)
    asked = [row.question for row in load_questions(str(questions))] if questions else []
    ids = [store.resolve(revision) for revision in (old, new)]
    before, after = ({row["sha"]: row for row in store.facts(commit_id)} for commit_id in ids)
    delta = difference(store.state(ids[0]), store.state(ids[1]))
    result = {
        "gained": [row for sha, row in after.items() if sha not in before],
        "lost": [row for sha, row in before.items() if sha not in after],
        "num_slots": delta.num_slots_trained,
        "num_values": delta.num_values,
        "probes": {"old": _probes(store, ids[0]), "new": _probes(store, ids[1])},
    }
    if asked:
        result["answers"] = _answers(
            store, asked, [commit_id or ATTACHED for commit_id in ids], delta, prompt, loading or LoadConfig()
        )
    return result


def settle(
    store: DeltaStore,
    change: Change,
    *,
    message: str,
    action: str,
    side: Side | None = None,
    relearn: bool = False,
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Commit what a revert, a cherry-pick or a merge changes.

    Args:
        store: The history.
        change: What it would change.
        message: What it is.
        action: Which of them it is.
        side: For whom conflicts are settled.
        relearn: Change the slots in conflict too, and teach the facts at stake again.
        loading: Device and precision of the model, for that.

    Returns:
        The commit, with the number of conflicts and the facts that were taught again.

    Raises:
        HistoryError: There are conflicts and neither is given, or the facts at stake are not kept.
    """
    num_conflicts = change.conflicts.num_slots_trained
    if relearn and num_conflicts:
        commit = _relearn(store, change, message, action, loading or LoadConfig())
        again = [describe(row) for row in change.at_stake]
    else:
        commit, again = commit_change(store, change, message, action, side), []
    return {"commit": dataclasses.asdict(commit), "num_conflicts": num_conflicts, "relearned": again}


def _relearn(store: DeltaStore, change: Change, message: str, action: str, loading: LoadConfig) -> Commit:
    facts = [_fact(row) for row in change.at_stake]
    head = store.head()
    written = store.details(head).get("config") if head else None
    config = from_json(FinetuneConfig, written, store.folder) if written else FinetuneConfig()
    usage = load_usage(store.folder / USAGE_FILE)
    with console.progress(f"load {store.folder}"):
        model, tokenizer = load(store.folder, **loading.options())
    delta = joined(change.delta, change.conflicts)
    delta.apply(pools(model))
    if facts:
        with console.progress(f"learn {len(facts)} facts again") as step:
            result = finetune(
                model,
                tokenizer,
                facts,
                usage,
                config,
                taught=facts_of(store.facts(head, change.details)),
                on_step=lambda done, total, _loss: step(done, total),
            )
        assert result.delta is not None
        delta = delta.compose(result.delta)
    details = {**change.details, "relearned": list(change.at_stake), "config": to_json(config)}
    return store.commit(
        delta,
        message,
        {**details, "versions": versions()},
        after=head,
        second_parent=change.second_parent,
        action=action,
    )


def _answers(
    store: DeltaStore,
    asked: Sequence[str],
    revisions: Sequence[str],
    delta: SparseDelta,
    prompt: PromptFormat,
    loading: LoadConfig,
) -> list[dict[str, str]]:
    with console.progress(f"load {store.folder}"):
        model, tokenizer = load(store.folder, revision=revisions[0], **loading.options())
    before, after = ask_both(model, tokenizer, asked, delta, prompt=prompt)
    return [
        {"question": question, "old": old, "new": new}
        for question, old, new in zip(asked, before, after, strict=True)
        if old != new
    ]


def ask_both(
    model: Any,
    tokenizer: Any,
    asked: Sequence[str],
    delta: SparseDelta,
    *,
    prompt: PromptFormat = "qa",
    max_new_tokens: int = 16,
) -> tuple[list[str], list[str]]:
    """Ask a model before and after a delta, which it has afterwards; answers in the order asked."""
    with console.progress(f"ask {len(asked)} questions twice"):
        before = answer_questions(model, tokenizer, asked, prompt=prompt, max_new_tokens=max_new_tokens)
        delta.apply(pools(model))
        after = answer_questions(model, tokenizer, asked, prompt=prompt, max_new_tokens=max_new_tokens)
    return before, after


def _probes(store: DeltaStore, commit_id: str | None) -> dict[str, Any]:
    """Probes as they were measured after a version was made; empty where they were not."""
    report = store.details(commit_id).get("report", {}) if commit_id else {}
    return {name: probe["after"] for name, probe in report.get("probes", {}).items()}


def _commit(store: DeltaStore, revision: str) -> Commit:
    found = store.resolve(revision)
    if found is None:
        raise HistoryError(
            f"{revision!r} is the memory as attached, before any commit; learn something first"
        )
    return store.get(found)


def _fact(row: FactRow) -> Fact:
    values = fact_text(row)
    if not values:
        raise HistoryError(
            f"fact {row['sha']} is at stake, but the history keeps only its hash; settle with --ours or "
            "--theirs, and learn it again from its file"
        )
    return parse_fact(values, row["sha"])
