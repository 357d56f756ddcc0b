"""What answers for a text: what its tokens read of each update, and what each changes in what comes next."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem import console
from sparsemem.config import LoadConfig
from sparsemem.data import Fact, load_facts
from sparsemem.errors import ConfigError, DataError
from sparsemem.likelihood import log_probs_at
from sparsemem.memory.attach import before_read, pools
from sparsemem.memory.checkpoint import local_folder, read_header
from sparsemem.memory.delta import RowChange
from sparsemem.prompts import SHOTS, qa_examples, qa_question
from sparsemem.slots.alignment import last_writers
from sparsemem.slots.usage import USAGE_FILE, Usage, load_usage
from sparsemem.store.commits import FactRow, fact_rows, facts_of
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.reads import ReadRecorder, Taught, Token, name_facts, written_slots


def explain_folder(
    folder: str | Path,
    text: str,
    *,
    question: bool = False,
    facts: str | Path | None = None,
    top: int = 5,
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Explain what the model of a folder makes of a text, as `explain` does.

    Args:
        folder: A memory folder.
        text: A text, or a question.
        question: Ask it in the prompt that `ask` uses.
        facts: Where to read what was taught, for updates that do not say so themselves.
        top: As in `explain`.
        loading: Device and precision of the model.

    Raises:
        SparsememError: The folder or the facts cannot be read, or there is no text.
    """
    folder = local_folder(folder)
    read_header(folder)
    _check(text, top)
    usage = load_usage(folder / USAGE_FILE)
    updates = taught_updates(folder, load_facts(facts) if facts else ())
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder, **(loading or LoadConfig()).options())
    usage.check(model)
    prompt, shown = (qa_examples(SHOTS), qa_question(text)) if question else ("", text)
    with console.progress("explain"):
        return explain(model, tokenizer, usage, updates, shown, prompt=prompt, top=top)


def taught_updates(folder: Path, facts: Sequence[Fact] = ()) -> list[Taught]:
    """List the updates of the version that is checked out, oldest first, numbered as in `log`.

    Args:
        folder: A memory folder.
        facts: What was taught, for updates that keep no facts, or only hashes of them.
    """
    store = DeltaStore(folder)
    return [
        Taught(
            name=str(number),
            message=commit.message,
            facts=_kept_or_given(store.details(commit.id).get("facts", ()), facts),
            delta=delta,
        )
        for number, (commit, delta) in enumerate(store.deltas(), 1)
    ]


def _kept_or_given(rows: Sequence[FactRow], given: Sequence[Fact]) -> tuple[Fact, ...]:
    hashes = {row["sha"] for row in rows}
    if kept := facts_of(rows):
        return tuple(kept)
    by_hash = zip(given, fact_rows(given), strict=True)
    return tuple(fact for fact, row in by_hash if not hashes or row["sha"] in hashes)


@torch.no_grad()
def explain(
    model: Any,
    tokenizer: Any,
    usage: Usage,
    updates: Sequence[Taught],
    text: str,
    *,
    prompt: str = "",
    top: int = 5,
) -> dict[str, Any]:
    """Say which learned slots the tokens of a text read, and what each update changes in what comes next.

    What an update changes is measured: the slots it was the last to write hold again what they held
    before it, and the text is read anew. That is one forward pass per update, beside two for all of
    them together; afterwards the model is what it was, bit for bit.

    Args:
        model: A model with a memory, as the updates left it.
        tokenizer: Its (fast) tokenizer.
        usage: Background usage.
        updates: All that were made, oldest first.
        text: What to explain.
        prompt: What stands before it; read, but its tokens are not listed.
        top: Next tokens to list, and updates to leave out, those with the most weight first.

    Returns:
        As plain JSON values:
        `fires`, whether anything learned answers at a token;
        `tokens`, each with the written `slots` it reads;
        `updates` read at tokens that fire, with `kl` and `log_probs_without` where they were left out;
        `next`, the most likely tokens, and their `log_probs_without_all` that was learned;
        `kl_all`, how far that is from the prediction, in nats;
        `num_passes`, forward passes it took, beside some that end at the memory, to name facts.

    Raises:
        ConfigError: `top` is not positive.
        DataError: There is no text.
    """
    _check(text, top)
    before = tokenizer(prompt)["input_ids"] if prompt else []
    ids, pieces = _pieces(tokenizer, text, add_special_tokens=not prompt)
    tokens = [Token(piece) for piece in [""] * len(before) + pieces]
    input_ids = torch.tensor([before + ids], device=next(model.parameters()).device)
    with before_read(model, ReadRecorder(tokens, usage, updates)):
        log_probs = _predict(model, input_ids)
    with _holding(model, _before_all(updates)):
        without_all = _predict(model, input_ids)
    best = log_probs.topk(min(top, len(log_probs))).indices
    found = _most_read(updates, tokens)
    for update in found[:top]:
        name_facts(model, tokenizer, usage, update, tokens)
    described = [_describe(update, tokens) for update in found]
    for update, entry in zip(found[:top], described, strict=False):
        with _holding(model, _before(updates, update)):
            without = _predict(model, input_ids)
        entry |= {"kl": _kl(log_probs, without), "log_probs_without": without[best].tolist()}
    return {
        "text": text,
        "fires": any(token.fires for token in tokens),
        "tokens": [_as_json(token) for token in tokens[len(before) :]],
        "num_documents": usage.num_documents,
        "updates": described,
        "next": [
            {"token": tokenizer.decode([token]), "log_prob": float(log_probs[token])}
            for token in best.tolist()
        ],
        "log_probs_without_all": without_all[best].tolist(),
        "kl_all": _kl(log_probs, without_all),
        "num_passes": 2 + len(found[:top]),
    }


def _check(text: str, top: int) -> None:
    if not text.strip():
        raise DataError("there is nothing to explain; give a text")
    if top < 1:
        raise ConfigError(f"top={top} is not positive; use 5 or so")


def _pieces(tokenizer: Any, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[str]]:
    """Return the ids of a text's tokens, and each as it stands there."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    pieces, end = [], 0
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        is_special = start == stop == 0
        # Of a letter that takes several tokens, the first one shows it.
        pieces.append(tokenizer.convert_ids_to_tokens(token) if is_special else text[max(start, end) : stop])
        end = max(end, stop)
    return encoded["input_ids"], pieces


def _predict(model: Any, input_ids: Tensor) -> Tensor:
    """Log-probabilities of what follows the last token, shape (vocabulary,)."""
    is_last = torch.zeros_like(input_ids, dtype=torch.bool)
    is_last[0, -1] = True
    return log_probs_at(model, input_ids, torch.ones_like(input_ids), is_last)[0].cpu()


def _kl(log_probs: Tensor, others: Tensor) -> float:
    """Divergence of a prediction from another one, in nats."""
    return float((log_probs.exp() * (log_probs - others)).sum().clamp(min=0))


def _most_read(updates: Sequence[Taught], tokens: Sequence[Token]) -> list[Taught]:
    """List the updates that are read at tokens that fire, those with the most weight first."""
    weights = {update.name: 0.0 for update in updates}
    for token in tokens:
        for slot in token.slots:
            if token.fires and slot.update is not None:
                weights[slot.update] += slot.share * token.agreement
    read = [update for update in updates if weights[update.name] > 0]
    return sorted(read, key=lambda update: -weights[update.name])


def _describe(update: Taught, tokens: Sequence[Token]) -> dict[str, Any]:
    slots = [slot for token in tokens if token.fires for slot in token.slots if slot.update == update.name]
    facts = [slot.fact for slot in slots if slot.fact is not None]
    return {
        "update": update.name,
        "message": update.message,
        "num_reads": len(slots),
        "facts": [{"fact": fact, "num_reads": facts.count(fact)} for fact in dict.fromkeys(facts)],
    }


def _as_json(token: Token) -> dict[str, Any]:
    return {
        "text": token.text,
        "fires": token.fires,
        "agreement": token.agreement,
        "num_reads": token.num_reads,
        "num_written": len(token.slots),
        "slots": [dataclasses.asdict(slot) for slot in token.slots],
    }


Rows = Mapping[str, tuple[Tensor, Tensor]]
"""Slots and the rows they are to hold, by pool."""


@contextlib.contextmanager
def _holding(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Within this context some slots hold other rows."""
    with contextlib.ExitStack() as stack:
        for name, (slot_ids, values) in rows.items():
            stack.enter_context(pools(model)[name].overwritten(slot_ids, values))
        yield


def _before(updates: Sequence[Taught], update: Taught) -> Rows:
    """Rows before an update, of the slots that no later one wrote."""
    rows, names = {}, [other.name for other in updates]
    for name, change in update.delta.changes.items():
        is_own = last_writers(change.slot_ids, written_slots(updates, name)) == names.index(update.name)
        rows[name] = change.slot_ids[is_own], change.before[is_own]
    return rows


def _before_all(updates: Sequence[Taught]) -> Rows:
    """Rows before the first update, of all slots that were written since."""
    changes: dict[str, list[RowChange]] = {}
    for update in updates:
        for name, change in update.delta.changes.items():
            changes.setdefault(name, []).append(change)
    rows = {}
    for name, of_pool in changes.items():
        slot_ids, place = torch.cat([change.slot_ids for change in of_pool]).unique(return_inverse=True)
        first = torch.full_like(slot_ids, len(place))
        first.scatter_reduce_(0, place, torch.arange(len(place)), "amin")
        rows[name] = slot_ids, torch.cat([change.before for change in of_pool])[first]
    return rows
