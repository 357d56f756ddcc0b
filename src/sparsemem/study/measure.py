"""Measure and train behind progress bars, and say in numbers what an update did."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from torch import nn

from sparsemem import console, distributed
from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.evaluation.evaluate import Evaluation, compare, evaluate
from sparsemem.evaluation.probes import Probe, load_probe, load_probes
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.memory.attach import memory_layers
from sparsemem.prompts import PromptFormat
from sparsemem.slots.usage import Usage
from sparsemem.training.finetune import FinetuneResult, finetune

BUILT_IN_PROBE = "general_knowledge"


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
    taught: Sequence[Fact] = (),
) -> FinetuneResult:
    """Run `finetune` behind a progress bar."""
    with console.progress(f"learn {len(facts)} facts") as step:
        return finetune(
            model,
            tokenizer,
            facts,
            usage,
            config,
            taught=taught,
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
    results: ResultCache | None = None,
) -> Evaluation:
    """Run `evaluate` behind a progress bar with that title; all processes have what the main one found."""
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
                results=results,
            ),
            model,
        )
