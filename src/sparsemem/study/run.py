"""One run of a comparison: what it is made of, and its result as JSON.

python -m sparsemem.study.run SPEC.json RESULT.json CACHE
"""

import dataclasses
import hashlib
import inspect
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsemem import console
from sparsemem.config import FinetuneConfig, MemoryConfig, applicable, from_json, to_json
from sparsemem.data import Fact, load_facts, load_texts
from sparsemem.errors import ConfigError, DataError, OutputError
from sparsemem.evaluation.evaluate import Evaluation, answer_tokens, recall
from sparsemem.evaluation.metrics import f1, mean_or_none
from sparsemem.evaluation.probes import load_probes
from sparsemem.files import read_json, write_json
from sparsemem.memory.attach import pools
from sparsemem.memory.base_model import fingerprint, load_base_model
from sparsemem.memory.checkpoint import FORMAT_VERSION, base_weights
from sparsemem.memory.delta import SparseDelta
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.slots.usage import FORMAT_VERSION as USAGE_FORMAT_VERSION
from sparsemem.slots.usage import USAGE_FILE, Usage, load_usage
from sparsemem.store.load import load
from sparsemem.study.attach import attach_to_folder
from sparsemem.study.base_scores import base_scores, digest, in_dtype
from sparsemem.study.measure import measure, metrics, num_base_values, train
from sparsemem.study.provenance import peak_bytes, provenance
from sparsemem.training.finetune import build_examples
from sparsemem.training.reading import with_documents_read

KNOWN_FROM = 0.5
"""F1 from which the base model counts as knowing a fact."""

EVAL_DTYPES = ("float32", "bfloat16")

ATTACH_DEFAULTS = {
    parameter.name: parameter.default
    for parameter in inspect.signature(attach_to_folder).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "loading"
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What one run is made of; every option is checked when it is built, no file is read.

    Raises:
        ConfigError: An option is unknown or cannot work.
    """

    model: str
    """Hub id, local folder or GGUF file."""
    facts: str
    """Where the facts are read."""
    num_facts: int | None = None
    """How many of them; all if not given."""
    first_fact: int = 0
    """The first of them, counted from 0."""
    num_paraphrases: int | None = None
    """Paraphrases to train each of them in, of those that are given; all if not given."""
    known_wrong_only: bool = False
    """Leave out facts whose trained question the base model answers with an F1 of 0.5 or more."""
    probes: tuple[str, ...] = ()
    """What must not be forgotten, as "name=source"."""
    background: tuple[str, ...] = ()
    """Sources of ordinary text: to fit keys and count usage, and for penalties and replay."""
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of `MemoryConfig`."""
    attach: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of `attach_to_folder`: keys, num_tokens, num_documents."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of `FinetuneConfig`."""
    prompt: PromptFormat = "qa"
    """How questions are asked."""
    eval_dtype: str = "float32"
    """Precision of the model while it is measured, before and after alike."""

    def __post_init__(self) -> None:
        check_format(self.prompt)
        if self.eval_dtype not in EVAL_DTYPES:
            raise ConfigError(
                f"eval_dtype={self.eval_dtype!r} is unknown; use one of {', '.join(EVAL_DTYPES)}"
            )
        if self.first_fact < 0 or (self.num_facts is not None and self.num_facts < 1):
            raise ConfigError(
                f"first_fact={self.first_fact} and num_facts={self.num_facts} are no slice; "
                "count from 0, and take at least one"
            )
        if self.num_paraphrases is not None and self.num_paraphrases < 0:
            raise ConfigError(f"num_paraphrases={self.num_paraphrases} is negative; use 0 or more")
        if unknown := sorted(set(self.attach) - set(ATTACH_DEFAULTS)):
            raise ConfigError(
                f"attach: unknown option {unknown[0]!r}; known are {', '.join(ATTACH_DEFAULTS)}"
            )
        _ = self.memory_config, self.finetune_config
        if self.needs_background and not self.background:
            raise ConfigError(
                f"method={self.finetune_config.method!r} needs background text here; give at least one source"
            )

    @property
    def memory_config(self) -> MemoryConfig:
        """Shape and place of the memory."""
        return from_json(MemoryConfig, self.memory, "memory")

    @property
    def attach_options(self) -> dict[str, Any]:
        """How the memory is attached, defaults filled in."""
        return ATTACH_DEFAULTS | self.attach

    @property
    def finetune_config(self) -> FinetuneConfig:
        """How to train."""
        return from_json(FinetuneConfig, self.config, "config")

    @property
    def needs_background(self) -> bool:
        """Whether ordinary text is needed: by a memory, a penalty or replay."""
        config = self.finetune_config
        return config.method == "memory" or config.is_guarded

    @property
    def files(self) -> list[Path]:
        """The local files among its sources."""
        background = self.background if self.needs_background else ()
        sources = (self.facts, *(probe.partition("=")[2] for probe in self.probes), *background)
        return [Path(source) for source in sources if Path(source).is_file()]

    def load_facts(self) -> list[Fact]:
        """Read the facts of its slice.

        Raises:
            DataError: There are fewer.
        """
        facts = load_facts(self.facts)
        end = len(facts) if self.num_facts is None else self.first_fact + self.num_facts
        if end > len(facts) or end <= self.first_fact:
            raise DataError(
                f"{self.facts} has {len(facts)} facts, not {self.num_facts or 1} from number "
                f"{self.first_fact} on; lower num_facts or first_fact"
            )
        kept = slice(self.num_paraphrases)
        return [
            dataclasses.replace(fact, paraphrases=fact.paraphrases[kept])
            for fact in facts[self.first_fact : end]
        ]

    def load_background(self) -> list[str]:
        """Read the background, if it is needed."""
        texts = [text for source in self.background for text in load_texts(source)]
        return texts if self.needs_background else []

    def described(self) -> dict[str, Any]:
        """Every option that applies, with its value; those of `FinetuneConfig` under their own names."""
        values = to_json(self)
        values |= to_json(self.finetune_config)
        del values["config"]
        values |= {"memory": to_json(self.memory_config), "attach": self.attach_options}
        return applicable(values)


def perform(spec: RunSpec, cache: Path) -> dict[str, Any]:
    """Measure a model, teach it, and measure it again.

    The attached memory and the scores of the base model are kept in `cache` for other runs; empty it
    after a change of the code that makes them.

    Args:
        spec: What to do. Only method="memory" runs on a model with a memory; baselines train the
            model as it came.
        cache: Folder for what runs share.

    Returns:
        config, metrics, scores of single questions, seed, seconds and provenance, as plain JSON values.

    Raises:
        SparsememError: Something given is not usable, or the run failed.
    """
    started = time.perf_counter()
    origin = provenance(data=spec.files)  # now, as code and data may be edited while this runs
    config = spec.finetune_config
    facts, probes, background = spec.load_facts(), load_probes(spec.probes), spec.load_background()
    model, tokenizer, usage = _load(spec, background, cache)
    if spec.known_wrong_only:
        known, _ = base_scores(model, tokenizer, facts, [], spec.prompt, spec.eval_dtype, cache)
        facts = _unknown(known, facts)
    if config.stream:
        _check_stream(tokenizer, facts, usage, config)
    asked = with_documents_read(facts)  # whatever the run learns of documents, so that runs can be compared
    before, results = base_scores(model, tokenizer, asked, probes, spec.prompt, spec.eval_dtype, cache)
    num_base, model_sha = num_base_values(model), fingerprint(base_weights(model))
    exact_sha = _exact_sha(model) if config.method == "memory" else ""
    stream = _Stream(tokenizer, facts, spec) if config.stream else None
    result = train(model, tokenizer, facts, usage, config, background, stream.ask if stream else None)
    trained = in_dtype(result.model, spec.eval_dtype)
    after = measure("measure after", trained, tokenizer, asked, probes, spec.prompt, results)
    values = {
        **metrics(before, after, result, num_base),
        "train_seconds": round(result.seconds, 1),
        **({"stream": stream.kept(result.model)} if stream else {}),
        **({"base_unchanged": _is_sparse(model, result.delta, exact_sha)} if result.delta else {}),
    }
    return {
        "config": spec.described(),
        "metrics": values,
        "scores": {"before": _question_scores(before), "after": _question_scores(after)},
        "seed": config.seed,
        "seconds": round(time.perf_counter() - started, 1),
        **origin,
        "model_sha": model_sha,
        "peak_bytes": peak_bytes(),
    }


class _Stream:
    """Recall of each fact right after it was learned, and when all of them were."""

    def __init__(self, tokenizer: Any, facts: Sequence[Fact], spec: RunSpec) -> None:
        self.tokenizer, self.facts, self.prompt = tokenizer, facts, spec.prompt
        self.max_new_tokens = answer_tokens(tokenizer, facts)
        self.size = spec.finetune_config.facts_per_batch
        self.right_after: list[dict[str, list[float]]] = []

    def ask(self, model: nn.Module) -> None:
        """Ask for the facts that were just learned."""
        start = len(self.right_after)
        self.right_after += self._recall(model, self.facts[start : start + self.size])

    def kept(self, model: nn.Module) -> dict[str, Any]:
        """Compare with what is known now, in all facts and in the first 100."""
        at_end = self._recall(model, self.facts)
        parts = {"all": slice(None), "first_100": slice(100)}
        return {
            name: {
                "num": len(at_end[part]),
                **{
                    wording: {
                        "right_after": _mean_of(wording, self.right_after[part]),
                        "at_end": _mean_of(wording, at_end[part]),
                    }
                    for wording in ("seen", "heldout")
                },
            }
            for name, part in parts.items()
        }

    def _recall(self, model: nn.Module, facts: Sequence[Fact]) -> list[dict[str, list[float]]]:
        """F1 of the questions of each fact."""
        scores = recall(model, self.tokenizer, facts, self.prompt, self.max_new_tokens)
        seen, heldout = iter(scores.seen_scores), iter(scores.heldout_scores)
        return [
            {
                "seen": list(itertools.islice(seen, 1 if fact.question else 0)),
                "heldout": list(itertools.islice(heldout, len(fact.heldout_questions))),
            }
            for fact in facts
        ]


def _mean_of(wording: str, facts: Sequence[dict[str, list[float]]]) -> float | None:
    return mean_or_none([score for fact in facts for score in fact[wording]])


def _check_stream(tokenizer: Any, facts: Sequence[Fact], usage: Usage | None, config: FinetuneConfig) -> None:
    """Raise DataError if training would leave facts out, and others have their turns."""
    num = len(facts) - len(build_examples(facts, tokenizer, usage, config))
    if num:
        raise DataError(
            f"{num} of {len(facts)} facts have nothing to learn within max_length={config.max_length}, "
            "and a stream asks for each after its turn; remove or shorten them"
        )


def attached_folder(spec: RunSpec, background: Sequence[str], cache: Path) -> Path:
    """Attach the memory of a run, or return the folder where an earlier run did."""
    formats = FORMAT_VERSION, USAGE_FORMAT_VERSION
    key = digest(formats, spec.model, to_json(spec.memory_config), spec.attach_options, list(background))
    folder = cache / "memories" / key
    if not folder.is_dir():
        try:
            attach_to_folder(spec.model, spec.background, folder, spec.memory_config, **spec.attach)
        except OutputError:
            if not folder.is_dir():  # else another run was faster, and its folder is as good
                raise
    return folder


def _load(spec: RunSpec, background: Sequence[str], cache: Path) -> tuple[Any, Any, Usage | None]:
    if spec.finetune_config.method != "memory":
        with console.progress(f"load {spec.model}"):
            return *load_base_model(spec.model, device="auto"), None
    folder = attached_folder(spec, background, cache)
    with console.progress(f"load {folder}"):
        return *load(folder, device="auto"), load_usage(folder / USAGE_FILE)


def _unknown(scores: Evaluation, facts: Sequence[Fact]) -> list[Fact]:
    """Leave out the facts whose trained question was answered right."""
    answers = scores.facts.answers
    unknown = [
        fact
        for fact in facts
        if fact.question is None or f1(answers[fact.question], fact.answers) < KNOWN_FROM
    ]
    if not unknown:
        raise DataError(f"the base model knows all {len(facts)} facts; give others, or keep the known ones")
    return unknown


def _is_sparse(model: nn.Module, delta: SparseDelta, sha_before: str) -> bool:
    """Whether an update of a fresh memory left all but the rows it recorded bit-identical."""
    for name, pool in pools(model).items():
        slot_ids, _ = pool.written()
        recorded = delta.changes[name].slot_ids if name in delta.changes else slot_ids[:0]
        if not torch.isin(slot_ids.cpu(), recorded.cpu()).all():
            return False
    return _exact_sha(model) == sha_before


def _exact_sha(model: nn.Module) -> str:
    """Digest of every bit of the weights: base, queries and keys, but not the pools' rows."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _question_scores(scores: Evaluation) -> dict[str, Any]:
    return {
        "seen": list(scores.facts.seen_scores),
        "heldout": list(scores.facts.heldout_scores),
        "probes": {name: list(probe.scores) for name, probe in scores.probes.items() if probe.scores},
    }


def main(argv: Sequence[str]) -> int:
    """Perform the run of a spec file; exit codes as of the command `sparsemem`."""
    spec_path, result_path, cache = (Path(word) for word in argv)

    def run() -> None:
        spec = from_json(RunSpec, read_json(spec_path), spec_path)
        write_json(result_path, perform(spec, cache))

    return console.exit_code(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
