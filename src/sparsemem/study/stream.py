"""Always training: facts come in, and batch by batch they are learned, measured, checked and committed."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.config import FinetuneConfig, LoadConfig
from sparsemem.data import Fact, load_texts
from sparsemem.errors import ConfigError
from sparsemem.memory.checkpoint import read_header
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.store import proposals
from sparsemem.store.commits import FactRow, fact_rows, facts_of
from sparsemem.store.history import DeltaStore
from sparsemem.study.measure import resolve_probes
from sparsemem.study.policy import Policy, contradictions, softened
from sparsemem.study.session import Attempt, Session
from sparsemem.study.sources import facts_from
from sparsemem.study.timeline import first_scores
from sparsemem.training.reading import with_documents_read


def stream(
    folder: str | Path,
    source: str,
    *,
    batch_size: int = 16,
    probes: Sequence[str] | None = None,
    config: FinetuneConfig | None = None,
    background: Sequence[str] = (),
    policy: Policy | None = None,
    propose: bool = False,
    follow: bool = False,
    poll_seconds: float = 2.0,
    prompt: PromptFormat = "qa",
    on_update: Callable[[dict[str, Any]], None] | None = None,
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Learn whatever comes from a source, one commit per batch, and never a row twice.

    What was learned, refused or put up for review is known by its content, so a stream that was stopped
    or killed goes on where it was, whatever the source looks like then.

    Args:
        folder: A memory folder.
        source: A .jsonl file that may grow, a folder of files, "-" for standard input, or a data set.
        batch_size: Facts per update.
        probes: What must not be forgotten, as in `learn`.
        config: How to train.
        background: Sources of ordinary text, for penalties and replay.
        policy: What to check before a commit; nothing if not given.
        propose: Learn nothing: put the facts up for review.
        follow: Wait for more at the end of the source.
        poll_seconds: How often to look for more.
        prompt: How questions are asked.
        on_update: Called with the report of each update, committed or refused.
        loading: Device and precision of the model.

    Returns:
        How many facts were `learned`, `refused`, `proposed` and `known` before, and of `updates`.

    Raises:
        SparsememError: Something given is not usable; what was committed until then stays.
    """
    config, policy, folder = config or FinetuneConfig(), policy or Policy(), Path(folder)
    read_header(folder)
    check_format(prompt)
    policy.check_source(source)
    if config.method != "memory":
        raise ConfigError(f"method={config.method!r} makes no history; stream needs method='memory'")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not positive; use 1 or more")
    learner = _Learner(folder, probes, config, background, policy, prompt, source, on_update, loading)
    batch: dict[str, Fact] = {}
    for fact in facts_from(source, follow=follow, poll_seconds=poll_seconds):
        if fact is not None:
            (row,) = fact_rows([fact])
            if row["sha"] in learner.known or row["sha"] in batch:
                learner.counts["known"] += 1
            else:
                batch[row["sha"]] = fact
        if batch and (fact is None or len(batch) == batch_size):
            learner.take(list(batch.values()), propose=propose)
            batch = {}
    if batch:
        learner.take(list(batch.values()), propose=propose)
    return learner.counts


def approve(folder: str | Path, names: Sequence[str], **options: Any) -> dict[str, Any]:
    """Learn facts that were put up for review, as one update; a contradiction is thereby confirmed.

    Args:
        folder: A memory folder.
        names: Beginnings of their shas; "all" for everything that waits.
        options: probes, config, background, prompt, policy, on_update and loading, as for `stream`.

    Returns:
        As `stream`.
    """
    store = DeltaStore(folder)
    rows = proposals.waiting(store, names)
    learner = _Learner(
        Path(folder),
        options.get("probes"),
        options.get("config") or FinetuneConfig(),
        options.get("background", ()),
        options.get("policy") or Policy(),
        options.get("prompt", "qa"),
        "review",
        options.get("on_update"),
        options.get("loading"),
    )
    taught = {row["sha"] for row in store.facts(store.head())}
    facts = facts_of(row for row in rows if row["sha"] not in taught)
    if facts:
        learner.take(facts, confirmed=True)
    taught = {row["sha"] for row in store.facts(store.head())}
    # Only now: a process that is killed before leaves them waiting.
    proposals.decide(store, [row for row in rows if row["sha"] in taught], proposals.APPROVED)
    return learner.counts


class _Learner:
    """Takes batches of facts to commits; loads the model when the first one comes."""

    def __init__(
        self,
        folder: Path,
        probes: Sequence[str] | None,
        config: FinetuneConfig,
        background: Sequence[str],
        policy: Policy,
        prompt: PromptFormat,
        source: str,
        on_update: Callable[[dict[str, Any]], None] | None,
        loading: LoadConfig | None,
    ) -> None:
        self.loading = loading
        self.folder, self.config, self.policy, self.prompt = folder, config, policy, prompt
        self.source, self.on_update = source, on_update
        self.probes = resolve_probes(probes)
        policy.check_probes([probe.name for probe in self.probes])
        self.background = [text for name in background for text in load_texts(name)]
        self.store = DeltaStore(folder)
        self.known = _ever_seen(self.store)
        self.counts = {"learned": 0, "refused": 0, "proposed": 0, "known": 0, "updates": 0}
        self.faded: list[Fact] = []
        self.rng = random.Random(config.seed)
        self.session: Session | None = None

    def take(self, facts: Sequence[Fact], *, propose: bool = False, confirmed: bool = False) -> None:
        """Learn a batch, refuse it, or put it up for review."""
        self.known |= {row["sha"] for row in fact_rows(facts)}
        if propose:
            self.counts["proposed"] += proposals.put(
                self.store, fact_rows(facts), proposals.PENDING, source=self.source
            )
            return
        taught = self.store.facts(self.store.head())
        found = contradictions(facts, taught)
        replaced: list[str] = []
        if found and self.policy.contradictions == "refuse" and not confirmed:
            for place, row in found.items():
                self._refuse([facts[place]], f"contradicts {row['sha']}: {row['question']} {row['answer']}")
            facts = [fact for place, fact in enumerate(facts) if place not in found]
        elif found:
            replaced = [row["sha"] for row in found.values()]
        if facts:
            self._learn(facts, [row for row in taught if row["sha"] not in replaced], replaced)

    def _learn(self, facts: Sequence[Fact], taught: Sequence[FactRow], replaced: list[str]) -> None:
        self.session = self.session or Session(self.folder, self.loading)
        earlier = self._drawn(taught)
        batch, self.faded = [*facts, *self.faded], []
        attached = first_scores(self.store) if self.policy.max_total_forgetting else {}
        problems: list[str] = []
        for times in range(self.policy.retries + 1):
            attempt = self.session.attempt(
                batch,
                self.probes,
                softened(self.config, times) if times else self.config,
                background=self.background,
                prompt=self.prompt,
                earlier=earlier,
            )
            now = {name: probe["before"] for name, probe in attempt.report["probes"].items()}
            problems = self.policy.violations(attempt.report, {**now, **attached})
            if not problems:
                return self._commit(attempt, facts, earlier, replaced, times)
            self.session.take_back(attempt)
            console.say(f"over budget ({'; '.join(problems)}): taken back", style="yellow")
        self._refuse(facts, "; ".join(problems), attempt.report)
        return None

    def _commit(
        self,
        attempt: Attempt,
        facts: Sequence[Fact],
        earlier: Sequence[Fact],
        replaced: list[str],
        tries: int,
    ) -> None:
        assert self.session is not None
        details: dict[str, Any] = {"source": self.source, "retries": tries}
        if replaced:
            details["forgets"] = replaced
        report = self.session.commit(attempt, f"{len(facts)} facts from {self.source}", **details)
        self.counts["learned"] += len(facts)
        self.counts["updates"] += 1
        self.faded = [
            fact
            for fact, f1 in zip(earlier, attempt.earlier, strict=True)
            if f1 is not None and f1 < self.policy.refresh_below
        ]
        if self.on_update:
            self.on_update(report)

    def _refuse(self, facts: Sequence[Fact], reason: str, report: dict[str, Any] | None = None) -> None:
        rows = fact_rows(facts)
        self.counts["refused"] += proposals.put(
            self.store, rows, proposals.REFUSED, source=self.source, reason=reason
        )
        console.say(f"refused {len(rows)} facts: {reason}", style="yellow")
        if self.on_update:
            self.on_update({**(report or {}), "refused": [row["sha"] for row in rows], "reason": reason})

    def _drawn(self, taught: Sequence[FactRow]) -> list[Fact]:
        """Draw earlier facts to be asked again."""
        if not self.policy.retest:
            return []
        readable = with_documents_read(facts_of(taught))
        # What of a document was taught again stands in the history beside it.
        askable = [*{(fact.question, fact.answer): fact for fact in readable if fact.question}.values()]
        num = len(askable) if self.policy.retest < 0 else min(self.policy.retest, len(askable))
        return self.rng.sample(askable, num)


def _ever_seen(store: DeltaStore) -> set[str]:
    """Shas of all facts that were taught at any time (also if taken back since), refused or proposed."""
    taught = {row["sha"] for commit in store.log() for row in store.details(commit.id).get("facts", ())}
    return taught | {row["sha"] for row in proposals.listed(store)}
