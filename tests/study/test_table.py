import pytest

from sparsemem.errors import ConfigError
from sparsemem.evaluation.statistics import mean_interval
from sparsemem.study.table import comparison, paired, with_block

from .made_up import result

PROBES = ("nq", "mmlu", "gsm8k", "wiki")


def cells(table):
    """Rows by method, cells by the title of their column up to what it is compared to."""
    columns = [column.partition(" (base")[0] for column in table.columns]
    return {row[0]: dict(zip(columns, row, strict=True)) for row in table.rows}


def test_one_run_of_each_method_side_by_side():
    results = {
        "memory.seed-0": result(0.7, 0.01, method="memory", probes=PROBES),
        "lora.seed-0": result(0.6, 0.5, learning_rate=2e-5, probes=PROBES),
    }
    table = comparison(results)
    assert cells(table) == {
        "memory": {
            "method": "memory",
            "learning rate": "0.1",
            "seeds": "1",
            "held-out F1": "0.700",
            "seen F1": "0.600",
            "nq kept": "99.0%",
            "nq F1, change": "-0.002",
            "mmlu accuracy, change": "-0.002",
            "gsm8k NLL, change": "+1.0%",
            "wiki perplexity, change": "+1.0%",
            "numbers changed": "2.50%",
        },
        "lora": {
            "method": "lora",
            "learning rate": "2e-05",
            "seeds": "1",
            "held-out F1": "0.600",
            "seen F1": "0.600",
            "nq kept": "50.0%",
            "nq F1, change": "-0.100",
            "mmlu accuracy, change": "-0.100",
            "gsm8k NLL, change": "+50.0%",
            "wiki perplexity, change": "+50.0%",
            "numbers changed": "2.50%",
        },
    }
    bases = [column.partition("(base ")[2] for column in table.columns]
    assert bases == ["", "", "", "0.010)", "0.020)", "", "0.200)", "0.200)", "0.200)", "0.200)", ""]


def test_seeds_become_a_mean_with_its_interval():
    scores = (0.5, 0.6, 0.8)
    results = {f"lora.seed-{seed}": result(score, seed=seed) for seed, score in enumerate(scores)}
    row = cells(comparison(results))["lora"]
    interval = mean_interval(scores)
    half = (interval.high - interval.low) / 2
    assert row["seeds"] == "3"
    assert row["held-out F1"] == f"{interval.mean:.3f} \u00b1 {half:.3f}"
    assert row["nq F1, change"] == "-0.020 \u00b1 0.000"


def test_what_was_not_measured_is_a_dash():
    results = {
        "a.seed-0": result(None, probes=("nq",)),
        "b.seed-0": result(0.5, probes=("wiki",), base=0.0),
        "c.seed-0": result(0.5, probes=("nq",)),
    }
    results["c.seed-0"]["metrics"]["probes"]["nq"]["retention"] = None
    rows = cells(comparison(results))
    assert rows["a"]["held-out F1"] == rows["a"]["wiki perplexity, change"] == "\u2013"
    assert rows["b"]["nq kept"] == rows["b"]["nq F1, change"] == "\u2013"
    assert rows["c"]["nq kept"] == "\u2013"
    assert rows["c"]["nq F1, change"] == "-0.020"


def test_markdown_has_a_line_per_row():
    table = comparison({"lora.seed-0": result(probes=())})
    head, rule, row = table.markdown().splitlines()
    assert head == f"| {' | '.join(table.columns)} |"
    assert rule == "|" + " --- |" * len(table.columns)
    assert row == "| lora | 0.1 | 1 | 0.500 | 0.600 | 2.50% |"


def test_a_table_can_be_turned():
    table = comparison({"lora.seed-0": result(probes=()), "full.seed-0": result(0.3, probes=())})
    turned = table.transposed()
    assert turned.columns == ("method", "lora", "full")
    assert ("held-out F1 (base 0.010)", "0.500", "0.300") in turned.rows
    assert turned.transposed() == table


def test_a_block_is_put_between_its_marks_and_nothing_else_moves():
    text = "a\n<!-- one:begin -->\nold\n<!-- one:end -->\nb\n<!-- two:begin -->\n<!-- two:end -->\n"
    new = with_block(text, "one", "new\n")
    assert new == text.replace("old\n", "new\n")
    assert with_block(new, "one", "new\n") == new
    assert with_block(text, "two", "x\n") == text.replace("two:begin -->\n", "two:begin -->\nx\n")
    with pytest.raises(ConfigError, match="<!-- three:begin -->"):
        with_block(text, "three", "")


def test_differences_are_of_the_same_questions_and_say_how_sure_they_are():
    memory = result(0.7, 0.0, method="memory", base=0.4)
    lora = [result(0.6, 0.5, seed=seed, base=0.4) for seed in (0, 1)]
    memory["scores"]["after"]["heldout"] = [1.0, 0.4]
    lora[0]["scores"]["after"]["heldout"] = [0.9, 0.2]
    lora[1]["scores"]["after"]["heldout"] = [0.9, 0.4]
    table = paired({"memory.seed-0": memory, "lora.seed-0": lora[0], "lora.seed-1": lora[1]})
    assert table.columns == ("method", "held-out F1 against memory", "nq F1 against base")
    assert table.rows[0] == ("memory", "\u2013", "+0.000 (+0.000 to +0.000)")
    assert table.rows[1] == ("lora", "-0.100 (-0.100 to -0.100)", "-0.200 (-0.200 to -0.200)")


def test_probes_of_all_methods_are_told_apart_by_their_metric():
    results = {
        "a.seed-0": result(probes=("nq",)),
        "b.seed-0": result(probes=("gsm8k",)),
        "b.seed-1": result(probes=("nq", "gsm8k"), seed=1),
        "c.seed-0": result(None, probes=()),
    }
    results["c.seed-0"]["scores"]["after"]["heldout"] = []
    table = paired(results)
    assert table.columns[2:] == ("nq F1 against base", "gsm8k NLL against base")
    dashes = {method: [cell == "\u2013" for cell in cells] for method, *cells in table.rows}
    assert dashes == {"a": [True, False, True], "b": [False, False, False], "c": [True, True, True]}
