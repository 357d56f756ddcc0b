"""Rules about what a memory may learn: budgets of forgetting, sources, contradictions."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sparsemem.config import FinetuneConfig, from_json
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, MissingDependencyError, MissingFileError
from sparsemem.evaluation.metrics import exact_match, forgetting, normalize
from sparsemem.evaluation.probes import LOWER_IS_BETTER
from sparsemem.store.commits import FactRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What `stream` checks before it commits; by default nothing is refused."""

    max_forgetting: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Largest relative loss of each probe in one update: {nq: 0.01}."""
    max_total_forgetting: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The same since the memory was attached."""
    min_retention: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Smallest share of a probe's right answers that one update must keep: {nq: 0.98}."""
    retries: int = 2
    """Times an update over budget is tried again, each with half the step and half the slots."""
    retest: int = 0
    """Earlier facts asked again after each update, drawn anew; -1 for all."""
    refresh_below: float = 0.0
    """Earlier facts whose F1 was found below this are taught again with the next update."""
    sources: Sequence[str] = ()
    """Patterns of what may be read ("/data/approved/*"); anything if empty."""
    contradictions: Literal["refuse", "replace"] = "refuse"
    """Facts that answer a question otherwise than one taught before: leave out, or learn in its place."""

    def __post_init__(self) -> None:
        for name in ("max_forgetting", "max_total_forgetting", "min_retention"):
            budgets = getattr(self, name)
            if not isinstance(budgets, Mapping) or not all(_is_number(v) for v in budgets.values()):
                raise ConfigError(
                    f"policy: {name}={budgets!r} must name a number for each probe: {{nq: 0.01}}"
                )
        if self.retries < 0 or self.retest < -1 or not 0 <= self.refresh_below <= 1:
            raise ConfigError(
                f"policy: retries={self.retries}, retest={self.retest}, refresh_below={self.refresh_below} "
                "cannot be; use 0 or more, -1 or more, 0 to 1"
            )
        if self.contradictions not in ("refuse", "replace"):
            raise ConfigError(
                f"policy: contradictions={self.contradictions!r} is unknown; use refuse or replace"
            )

    def check_probes(self, names: Sequence[str]) -> None:
        """Raise ConfigError if a budget is of a probe that is not measured."""
        for budgets in (self.max_forgetting, self.max_total_forgetting, self.min_retention):
            if unknown := sorted(set(budgets) - set(names)):
                measured = ", ".join(names) or "none"
                raise ConfigError(
                    f"policy: there is a budget for probe {unknown[0]!r}, measured are {measured}; "
                    "add it to --probes"
                )

    def check_source(self, source: str) -> None:
        """Raise DataError if facts from there are not allowed."""
        if self.sources and not any(fnmatch.fnmatch(source, pattern) for pattern in self.sources):
            raise DataError(f"{source} is none of the allowed sources ({', '.join(self.sources)})")

    def violations(self, report: Mapping[str, Any], attached: Mapping[str, float]) -> list[str]:
        """Say which budgets an update breaks, a line each.

        Args:
            report: Its report.
            attached: Scores of the probes before anything was learned.
        """
        found = []
        for name, probe in report["probes"].items():
            if probe["forgetting"] > self.max_forgetting.get(name, float("inf")):
                found.append(
                    f"{name} forgot {probe['forgetting']:.2%}, allowed {self.max_forgetting[name]:.2%}"
                )
            kept = probe.get("retention")
            if kept is not None and kept < self.min_retention.get(name, 0.0):
                found.append(f"{name} kept {kept:.2%}, required {self.min_retention[name]:.2%}")
            allowed = self.max_total_forgetting.get(name)
            if allowed is not None and name in attached:
                higher_is_better = probe["metric"] not in LOWER_IS_BETTER
                total = forgetting(attached[name], probe["after"], higher_is_better=higher_is_better)
                if total > allowed:
                    found.append(f"{name} forgot {total:.2%} since it was attached, allowed {allowed:.2%}")
        return found


def softened(config: FinetuneConfig, times: int) -> FinetuneConfig:
    """Take half the step and half the slots, so many times."""
    return dataclasses.replace(
        config, learning_rate=config.lr / 2**times, top_t=max(1, config.top_t // 2**times)
    )


def load_policy(path: str | Path) -> Policy:
    """Read a policy from YAML or JSON.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: It is not a policy.
        MissingDependencyError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("a policy needs PyYAML; pip install 'sparsemem[study]'") from error
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; check the path")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not options; write name: value lines")
    return from_json(Policy, values or {}, path)


def contradictions(facts: Sequence[Fact], known: Sequence[FactRow]) -> dict[int, FactRow]:
    """Find facts that answer a question otherwise than a fact taught before.

    Returns:
        The known fact by the place of the new one.
    """
    by_question = {normalize(row["question"]): row for row in known if row.get("question")}
    found = {}
    for place, fact in enumerate(facts):
        row = by_question.get(normalize(fact.question)) if fact.question else None
        if row is not None and not any(
            exact_match(answer, [row["answer"], *row.get("aliases", ())]) for answer in fact.answers
        ):
            found[place] = row
    return found


def check_contradictions(facts: Sequence[Fact], known: Sequence[FactRow], *, replace: bool) -> list[str]:
    """Find what the facts replace; returns the shas of the known ones.

    Raises:
        DataError: They contradict a fact taught before, and are not said to replace it.
    """
    found = contradictions(facts, known)
    if found and not replace:
        place, row = next(iter(found.items()))
        fact = facts[place]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DataError(
            f"{fact.id}: {fact.question!r} is {fact.answer!r}, but {row['answer']!r} was taught{more}; "
            "correct it, or confirm with --replace"
        )
    return [row["sha"] for row in found.values()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
