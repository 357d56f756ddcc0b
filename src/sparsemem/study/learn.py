"""One measured update: evaluate, train, evaluate again, commit, report."""

import os
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from sparsemem import console, distributed
from sparsemem.config import FinetuneConfig, to_json
from sparsemem.data import Fact, load_facts, load_texts
from sparsemem.errors import ConfigError, DataError, OutputError
from sparsemem.evaluation.evaluate import Evaluation, compare, evaluate, fact_values
from sparsemem.evaluation.probes import Probe, load_probe, load_probes
from sparsemem.files import check_new, new_folder
from sparsemem.memory.attach import detach_memory, memory_layers, pools
from sparsemem.memory.checkpoint import local_folder, read_header
from sparsemem.memory.delta import SparseDelta, distinct
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.slots.usage import USAGE_FILE, Usage, load_usage
from sparsemem.store.commits import fact_rows
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.provenance import versions
from sparsemem.training.finetune import FinetuneResult, finetune
from sparsemem.training.methods import check_method

BUILT_IN_PROBE = "general_knowledge"


def learn(
    folder: str | Path,
    facts: str | Path | Sequence[Fact],
    *,
    probes: Sequence[str] | None = None,
    config: FinetuneConfig | None = None,
    background: Sequence[str] = (),
    message: str = "",
    prompt: PromptFormat = "qa",
    out: str | Path | None = None,
    hash_facts: bool = False,
) -> dict[str, Any]:
    """Teach the model of a folder some facts, and measure what it learned and what it forgot.

    Args:
        folder: A memory folder.
        facts: Facts, or where to read them.
        probes: What must not be forgotten, as "name=source"; by default 160 built-in questions of
            general knowledge, and nothing if the sequence is empty.
        config: How to train. method="memory" commits a delta to the folder; the others are
            baselines, which leave the folder as it is.
        background: Sources of ordinary text, for `penalty` and `replay_fraction`.
        message: What this update is.
        prompt: How questions are asked.
        out: Folder to save a baseline's model or adapter to.
        hash_facts: Keep only hashes of the facts in the history, not their text.

    Returns:
        The report, as plain JSON values; of method="memory" also `update`, its number, and `commit`.

    Raises:
        SparsememError: Something given is not usable, or the run failed; the folder is as it was.
    """
    config, folder = config or FinetuneConfig(), Path(folder)
    _check_options(folder, config, prompt, out)
    fact_list = load_facts(facts) if isinstance(facts, str | Path) else list(facts)
    if not fact_list:
        raise DataError("there are no facts; give at least one")
    probe_list = resolve_probes(probes)
    texts = [text for source in background for text in load_texts(source)]
    usage = load_usage(folder / USAGE_FILE)
    with console.progress(f"load {folder}"):
        store = DeltaStore(folder)
        learned_on = distributed.from_main(store.head)
        model, tokenizer = distributed.main_first(lambda: load(folder))
        usage.check(model)
        num_base = num_base_values(model)
    before = measure("measure before", model, tokenizer, fact_list, probe_list, prompt)
    started = time.perf_counter()
    result = train(model, tokenizer, fact_list, usage, config, texts)
    seconds = time.perf_counter() - started
    after = measure("measure after", result.model, tokenizer, fact_list, probe_list, prompt)
    report = {
        **metrics(before, after, result, num_base),
        "seconds": round(seconds, 1),
        "method": config.method,
        "seed": config.seed,
        "prompt": prompt,
        "message": message,
    }
    if result.delta is not None:
        delta = result.delta
        details = {
            "facts": fact_rows(fact_list, hashed=hash_facts),
            "report": report,
            "config": to_json(config),
            "versions": versions(),
        }
        report |= distributed.from_main(lambda: _commit(store, delta, message, details, learned_on))
    elif out:
        distributed.from_main(lambda: _save_baseline(result.model, tokenizer, Path(out)))
        report["out"] = str(out)
    return report


def _check_options(
    folder: Path, config: FinetuneConfig, prompt: PromptFormat, out: str | Path | None
) -> None:
    """Find what cannot work before the minutes that would be lost on it."""
    read_header(folder)
    check_format(prompt)
    check_method(config.method)
    if config.method == "memory":
        if out:
            raise ConfigError(f"out={out} is for baselines; method='memory' commits its delta to {folder}")
        if not os.access(folder, os.W_OK):
            raise OutputError(f"{folder} is not writable, nothing could be committed; change its rights")
    elif out:
        check_new(Path(out))


def _commit(
    store: DeltaStore, delta: SparseDelta, message: str, details: dict[str, Any], learned_on: str | None
) -> dict[str, Any]:
    commit = store.commit(delta, message, details, after=learned_on)
    num_bytes = store.objects.path(commit.object).stat().st_size
    return {"update": len(store), "commit": commit.id, "delta_bytes": num_bytes, "digest": commit.digest}


def _save_baseline(model: Any, tokenizer: Any, out: Path) -> None:
    detach_memory(model)
    with new_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def evaluate_folder(
    folder: str | Path,
    *,
    facts: str | Path | None = None,
    probes: Sequence[str] | None = None,
    prompt: PromptFormat = "qa",
) -> dict[str, Any]:
    """Measure the model of a folder as it is; facts and probes as in `learn`.

    Returns:
        `facts`, and `probes` with metric, value and num by name, as plain JSON values.
    """
    folder = local_folder(folder)
    read_header(folder)
    fact_list = load_facts(facts) if facts else []
    probe_list = resolve_probes(probes)
    started = time.perf_counter()
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder)
        store = DeltaStore(folder)
    scores = measure("measure", model, tokenizer, fact_list, probe_list, prompt)
    trained = {name: pool.num_rows for name, pool in pools(model).items()}
    num_values = sum(distinct(pool.rows.cpu())[0].numel() for pool in pools(model).values())
    return {
        "facts": fact_values(scores.facts),
        "probes": {
            name: {"metric": score.metric, "value": score.value, "num": score.num}
            for name, score in scores.probes.items()
        },
        "num_slots_trained": sum(trained.values()),
        "changed_fraction": num_values / num_base_values(model),
        "delta_bytes": sum(store.objects.path(c.object).stat().st_size for c in store.log()),
        "seconds": round(time.perf_counter() - started, 1),
        "method": "memory",
        "seed": None,
        "prompt": prompt,
    }


def resolve_probes(specs: Sequence[str] | None) -> list[Probe]:
    """Load probes by their specs, or the built-in one if none were given."""
    if specs is not None:
        return load_probes(specs)
    return [load_probe(BUILT_IN_PROBE, built_in_probe())]


def built_in_probe() -> str:
    """Path of the built-in questions."""
    return str(files("sparsemem.evaluation") / f"{BUILT_IN_PROBE}.jsonl")


def num_base_values(model: nn.Module) -> int:
    """Count the weights of the model under the memory."""
    memory = {id(p) for layer in memory_layers(model) for p in layer.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in memory)


def metrics(before: Evaluation, after: Evaluation, result: FinetuneResult, num_base: int) -> dict[str, Any]:
    """Say what an update learned, what it forgot and how much it changed, as plain JSON values.

    Args:
        before: Scores before the update.
        after: Scores after it.
        result: What the training did.
        num_base: Weights of the base model.
    """
    return {
        **compare(before, after),
        "num_slots_trained": result.delta.num_slots_trained if result.delta else 0,
        "num_trained": result.num_trained,
        "changed_fraction": result.num_trained / num_base,
        # Of a baseline: its trained weights in float32. A committed delta's is its file's size.
        "delta_bytes": 4 * result.num_trained,
        "final_loss": result.losses[-1],
    }


def train(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    usage: Usage | None,
    config: FinetuneConfig,
    background: Sequence[str] = (),
    evaluate: Callable[[nn.Module], Any] | None = None,
) -> FinetuneResult:
    """Run `finetune` behind a progress bar."""
    with console.progress(f"learn {len(facts)} facts") as step:
        return finetune(
            model,
            tokenizer,
            facts,
            usage,
            config,
            background=background,
            evaluate=evaluate,
            on_step=lambda done, total, loss: step(done, total, f"loss {loss:.3f}"),
        )


def measure(
    title: str,
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    probes: Sequence[Probe],
    prompt: PromptFormat,
) -> Evaluation:
    """Run `evaluate` behind a progress bar with that title; of several processes in the main one."""
    total = len(probes) + bool(facts)
    with console.progress(title) as step:
        done = iter(range(total + 1))
        return distributed.from_main(
            lambda: evaluate(
                model,
                tokenizer,
                facts,
                probes,
                prompt=prompt,
                on_part=lambda name: step(next(done), total, name),
            )
        )
