"""Results as `perform` returns them, made up."""

from sparsemem.config import FinetuneConfig, to_json


def result(
    heldout=0.5,
    forgetting=0.1,
    *,
    seen=0.6,
    method="lora",
    learning_rate=0.1,
    seed=0,
    probes=("nq",),
    base=0.2,
):
    """One run; a probe's metric follows from its name."""
    config = FinetuneConfig(method=method, learning_rate=learning_rate, seed=seed)
    return {
        "config": to_json(config),
        "metrics": {
            "facts": {
                "heldout_f1": heldout,
                "seen_f1": seen,
                "before": {"heldout_f1": 0.01, "seen_f1": 0.02},
            },
            "probes": {name: probe(name, base, forgetting) for name in probes},
            "changed_fraction": 0.025,
        },
        "scores": {
            "before": scores(0.0, probes, base),
            "after": scores(heldout, probes, base * (1 - forgetting)),
        },
        "seed": seed,
    }


def scores(heldout, probes, value):
    """Of two questions each."""
    return {"heldout": [heldout] * 2, "seen": [], "probes": {name: [value] * 2 for name in probes}}


def probe(name, base, forgetting):
    metric = {"nq": "f1", "mmlu": "accuracy", "gsm8k": "nll", "wiki": "perplexity"}[name]
    worse = -1 if metric in ("f1", "accuracy") else 1
    values = {
        "metric": metric,
        "before": base,
        "after": base * (1 + worse * forgetting),
        "forgetting": forgetting,
    }
    return {**values, "retention": 1 - forgetting} if metric in ("f1", "accuracy") else values
