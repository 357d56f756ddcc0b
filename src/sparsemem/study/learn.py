"""One measured update: evaluate, train, evaluate again, commit, report."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemem import console, distributed
from sparsemem.config import FinetuneConfig, LoadConfig
from sparsemem.data import Fact, load_facts, load_texts
from sparsemem.errors import ConfigError, DataError, OutputError
from sparsemem.evaluation.evaluate import fact_values
from sparsemem.files import check_new, new_folder
from sparsemem.memory.attach import detach_memory, pools
from sparsemem.memory.checkpoint import local_folder, read_header
from sparsemem.memory.shard import place_of_part
from sparsemem.prompts import PromptFormat, check_format
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.measure import measure, num_base_values, resolve_probes
from sparsemem.study.policy import check_contradictions
from sparsemem.study.session import Session
from sparsemem.training.baselines import check_method
from sparsemem.training.finetune import check_fsdp
from sparsemem.training.reading import with_documents_read


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
    replace: bool = False,
    loading: LoadConfig | None = None,
    fsdp: bool = False,
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
        replace: Teach facts that contradict some taught before; these count as taken back.
        loading: Device and precision of the model.
        fsdp: Spread the base model over the processes that torchrun or `accelerate launch` started;
            with method="memory", without mixed precision, replay and penalties on background text.

    Returns:
        The report, as plain JSON values; of method="memory" also `update`, its number, and `commit`.

    Raises:
        SparsememError: Something given is not usable, or the run failed; the folder is as it was.
    """
    config, folder = config or FinetuneConfig(), Path(folder)
    _check_options(folder, config, prompt, out)
    if fsdp:
        place_of_part((loading or LoadConfig()).device)
        check_fsdp(config)
    fact_list = load_facts(facts) if isinstance(facts, str | Path) else list(facts)
    if not fact_list:
        raise DataError("there are no facts; give at least one")
    probe_list = resolve_probes(probes)
    texts = [text for source in background for text in load_texts(source)]
    session = Session(folder, loading, fsdp=fsdp)
    known = session.store.facts(session.head) if config.method == "memory" else []
    replaced = check_contradictions(fact_list, known, replace=replace)
    attempt = session.attempt(fact_list, probe_list, config, background=texts, prompt=prompt)
    if config.method == "memory":
        details = {"forgets": replaced} if replaced else {}
        return session.commit(attempt, message, hash_facts=hash_facts, **details)
    report = {**attempt.report, "message": message}
    if out:
        distributed.from_main(lambda: _save_baseline(attempt.result.model, session.tokenizer, Path(out)))
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
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Measure the model of a folder as it is; arguments as in `learn`.

    Returns:
        `facts`, and `probes` with metric, value and num by name, as plain JSON values.
    """
    folder = local_folder(folder)
    read_header(folder)
    fact_list = with_documents_read(load_facts(facts)) if facts else []
    probe_list = resolve_probes(probes)
    started = time.perf_counter()
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder, **(loading or LoadConfig()).options())
        store = DeltaStore(folder)
    scores = measure("measure", model, tokenizer, fact_list, probe_list, prompt)
    num_slots = sum(len(pool.written_ids) for pool in pools(model).values())
    num_values = sum(pool.rows.numel() for pool in pools(model).values())
    return {
        "facts": fact_values(scores.facts),
        "probes": {
            name: {"metric": score.metric, "value": score.value, "num": score.num}
            for name, score in scores.probes.items()
        },
        "num_slots_trained": num_slots,
        "changed_fraction": num_values / num_base_values(model),
        "delta_bytes": sum(store.objects.path(c.object).stat().st_size for c in store.log()),
        "seconds": round(time.perf_counter() - started, 1),
        "method": "memory",
        "seed": None,
        "prompt": prompt,
    }
