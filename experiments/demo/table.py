"""Write the demo's results into README.md, from experiments/demo/results/seed-*.json.

python experiments/demo/table.py
"""

import json
from collections.abc import Callable
from pathlib import Path

from sparsemem.study.table import with_block

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(readme: str) -> str:
    """Return the README with its block of results made anew."""
    return with_block(readme, "demo", render())


def render() -> str:
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((HERE / "results").glob("seed-*.json"))
    ]
    metrics = [run["metrics"] for run in runs]
    num_shown = 5
    shown = "".join(
        f"| {row['question']} | {row['right']} | {row['before']} | {row['after']} | {row['undone']} |\n"
        for row in runs[0]["shown"][:num_shown]
    )

    def row(label: str, get: Callable[[dict], float], form: str) -> str:
        values = [get(m) for m in metrics]
        mean = sum(values) / len(values)
        span = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"| {label} | {mean:{form}}{span} |\n"

    general, wiki = "general_knowledge", "wikipedia"
    return (
        f"`make demo` teaches SmolLM2-135M-Instruct {metrics[0]['facts']['num']} invented facts. "
        "It asks in wordings that were never trained on:\n\n"
        "| question | right | before | after | after undo |\n|---|---|---|---|---|\n"
        f"{shown}\n"
        f"Mean (and range) over {len(runs)} seed{'s' if len(runs) > 1 else ''}, made by `python "
        "experiments/demo/run.py SEED` and kept with commit, versions and hardware in "
        "`experiments/demo/results/`:\n\n"
        "| | |\n|---|---|\n"
        + row("facts, F1 in held-out wordings, before", lambda m: m["facts"]["before"]["heldout_f1"], ".3f")
        + row("facts, F1 in held-out wordings, after", lambda m: m["facts"]["heldout_f1"], ".3f")
        + row("facts, F1 in the trained wording, after", lambda m: m["facts"]["seen_f1"], ".3f")
        + row(
            "general knowledge: right answers still right", lambda m: m["probes"][general]["retention"], ".1%"
        )
        + row("general knowledge: F1 forgotten", lambda m: m["probes"][general]["forgetting"], "+.1%")
        + row("perplexity of other Wikipedia text, change", lambda m: m["probes"][wiki]["forgetting"], "+.2%")
        + row("slots trained", lambda m: m["num_slots_trained"], ",.0f")
        + row("numbers changed, relative to the model", lambda m: m["changed_fraction"], ".2%")
        + row("size of the update, MB", lambda m: m["delta_bytes"] / 1e6, ".1f")
    )


if __name__ == "__main__":
    main()
