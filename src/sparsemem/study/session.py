"""The model of a folder, loaded once, and taught and measured as often as wanted."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemem import console, distributed
from sparsemem.config import FinetuneConfig, LoadConfig, to_json
from sparsemem.data import Fact
from sparsemem.evaluation.evaluate import Evaluation, recall
from sparsemem.evaluation.metrics import mean_or_none
from sparsemem.evaluation.probes import Probe, ProbeScore
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.memory.attach import pools
from sparsemem.memory.delta import SparseDelta
from sparsemem.memory.shard import shard
from sparsemem.prompts import PromptFormat
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.commits import Commit, fact_rows, facts_of
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.measure import measure, metrics, num_base_values, train
from sparsemem.study.provenance import versions
from sparsemem.training.finetune import FinetuneResult
from sparsemem.training.reading import facts_to_learn


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An update that was trained and measured, and is not committed yet.

    Args:
        facts: What was taught.
        config: How.
        result: What the training did.
        after: Scores after it.
        report: The report, as plain JSON values.
        earlier: F1 of each earlier fact that was asked again, in its order; None of one without a question.
    """

    facts: tuple[Fact, ...]
    config: FinetuneConfig
    result: FinetuneResult
    after: Evaluation
    report: dict[str, Any]
    earlier: tuple[float | None, ...] = ()

    @property
    def delta(self) -> SparseDelta:
        """The rows it changed; of method="memory"."""
        assert self.result.delta is not None
        return self.result.delta


class Session:
    """The model of a memory folder at the version that is checked out.

    Args:
        folder: A memory folder.
        loading: Device and precision of the model.
        fsdp: Spread the base model over the processes that a launcher started.

    Raises:
        SparsememError: The folder holds no memory, or one that is damaged; or there is one process to
            spread the model over.
    """

    def __init__(self, folder: str | Path, loading: LoadConfig | None = None, *, fsdp: bool = False) -> None:
        self.folder = Path(folder)
        self.store = DeltaStore(self.folder)
        self.usage = load_usage(self.folder / USAGE_FILE)
        with console.progress(f"load {self.folder}"):
            self.head = distributed.from_main(self.store.head)
            loading = loading or LoadConfig()
            options = loading.options() | ({"device": "cpu"} if fsdp else {})
            self.model, self.tokenizer = distributed.main_first(lambda: load(self.folder, **options))
            self.usage.check(self.model)
            self.num_base = num_base_values(self.model)
            if fsdp:
                shard(self.model, loading.device)
        self._probes_now: dict[str, ProbeScore] = {}
        self._results = ResultCache()

    def attempt(
        self,
        facts: Sequence[Fact],
        probes: Sequence[Probe],
        config: FinetuneConfig,
        *,
        background: Sequence[str] = (),
        prompt: PromptFormat = "qa",
        earlier: Sequence[Fact] = (),
    ) -> Attempt:
        """Measure, train and measure again; commit or take back what comes out.

        Args:
            facts: What to teach; of documents, what is found in them is asked.
            probes: What must not be forgotten; asked before only if the version was not measured yet.
            config: How to train.
            background: Ordinary text, for penalties and replay.
            prompt: How questions are asked.
            earlier: Facts taught before, to be asked again.
        """
        told = facts_to_learn(facts, config)
        known = self._probes_now
        asked = [probe for probe in probes if probe.name not in known]
        results = self._results if config.method == "memory" else None
        before = measure("measure before", self.model, self.tokenizer, told, asked, prompt, results)
        scores = {probe.name: {**known, **before.probes}[probe.name] for probe in probes}
        taught = distributed.from_main(lambda: facts_of(self.store.facts(self.head)))
        started = time.perf_counter()
        result = train(self.model, self.tokenizer, told, self.usage, config, background, taught=taught)
        seconds = time.perf_counter() - started
        after = measure("measure after", result.model, self.tokenizer, told, probes, prompt, results)
        self._probes_now = scores
        again = self._ask_again(earlier, prompt) if earlier else ()
        report = {
            **metrics(Evaluation(before.facts, scores), after, result, self.num_base),
            "seconds": round(seconds, 1),
            "method": config.method,
            "seed": config.seed,
            "prompt": prompt,
        }
        if earlier:
            report["earlier"] = {
                "num": len(earlier),
                "f1": mean_or_none([f1 for f1 in again if f1 is not None]),
            }
        return Attempt(tuple(facts), config, result, after, report, again)

    def commit(
        self, attempt: Attempt, message: str = "", *, hash_facts: bool = False, **details: Any
    ) -> dict[str, Any]:
        """Commit an attempt; returns its report, with the commit.

        Raises:
            HistoryError: Another version was checked out since.
            OutputError: It could not be written.
        """
        report = {**attempt.report, "message": message}
        kept = {
            "facts": fact_rows(attempt.facts, hashed=hash_facts),
            "report": report,
            "config": to_json(attempt.config),
            "versions": versions(),
            **details,
        }

        def write() -> dict[str, Any]:
            return self._described(self.store.commit(attempt.delta, message, kept, after=self.head))

        committed = distributed.from_main(write)
        self.head, self._probes_now = committed["commit"], attempt.after.probes
        return {**report, **committed}

    def take_back(self, attempt: Attempt) -> None:
        """Put the model back to what it was before an attempt."""
        attempt.delta.invert().apply(pools(self.model))

    def _described(self, commit: Commit) -> dict[str, Any]:
        return {
            "update": len(self.store),
            "commit": commit.id,
            "delta_bytes": self.store.objects.path(commit.object).stat().st_size,
            "digest": commit.digest,
        }

    def _ask_again(self, facts: Sequence[Fact], prompt: PromptFormat) -> tuple[float | None, ...]:
        with console.progress(f"ask {len(facts)} earlier facts"):
            scores = distributed.from_main(
                lambda: recall(self.model, self.tokenizer, facts, prompt), self.model
            )
        seen = iter(scores.seen_scores)
        return tuple(next(seen) if fact.question else None for fact in facts)
