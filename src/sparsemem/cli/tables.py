"""Reports for people."""

from typing import Any

from sparsemem import console


def show_report(report: dict[str, Any]) -> None:
    """Print what an update learned, what it forgot and what it cost."""
    facts, before = report["facts"], report["facts"]["before"]
    rows = [
        (
            f"facts, {label}",
            "f1" if key.endswith("f1") else "exact match",
            number(before[key]),
            number(facts[key]),
            "",
        )
        for label, key in (
            ("trained wording", "seen_f1"),
            ("held-out wording", "heldout_f1"),
            ("held-out wording", "heldout_em"),
        )
        if facts[key] is not None
    ]
    for name, probe in report["probes"].items():
        note = f"{probe['forgetting']:+z.1%} forgotten"
        if probe.get("retention") is not None:
            note += f", {probe['retention']:.1%} of right answers kept"
        rows.append((name, probe["metric"], number(probe["before"]), number(probe["after"]), note))
    title = f"{facts['num']} facts, method {report['method']}"
    console.table(title, ("", "measure", "before", "after", "forgetting"), rows)
    what = (
        f"{report['num_slots_trained']} slots"
        if report["num_slots_trained"]
        else f"{report['num_trained']:,} weights"
    )
    console.say(
        f"trained {what}, {report['changed_fraction']:.3%} of the model, in {report['seconds']:.0f} s; "
        f"the update is {size(report['delta_bytes'])}"
    )
    if "update" in report:
        console.say(f"committed as update {report['update']}; take it back with learn DIR --undo")
    elif "out" in report:
        console.say(f"saved to {report['out']}")
    else:
        console.say("a baseline: measured, not kept (--out DIR would)")


def show_evaluation(result: dict[str, Any]) -> None:
    """Print scores of one model state."""
    facts = result["facts"]
    rows = [
        (f"facts: {key}", number(facts[key]), str(facts["num"]))
        for key in ("seen_f1", "heldout_f1", "heldout_em")
        if facts[key] is not None
    ]
    rows += [(f"{n}: {p['metric']}", number(p["value"]), str(p["num"])) for n, p in result["probes"].items()]
    console.table("", ("measure", "value", "questions or tokens"), rows)


def number(value: float) -> str:
    """Three significant decimals."""
    return f"{value:.3f}"


def size(num_bytes: float) -> str:
    """Bytes in a unit a person reads."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
