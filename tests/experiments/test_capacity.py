import dataclasses
import json
import math

import pytest

from sparsemem.slots.capacity import LAW


@pytest.fixture
def measure(measure_of):
    return measure_of("capacity")


def result(num_keys, top_t, full):
    points = [{"num_facts": n, "taken": 1 - math.exp(-n / full), "fill": 0.1, "answered": 1.0, "fires": 0.0}
              for n in (10, 100, 1000)]  # fmt: skip
    return {"config": {"num_keys": num_keys, "num_slots": num_keys**2, "top_t": top_t}, "points": points}


def full_of(num_keys, top_t):
    return 0.3 * num_keys**1.6 / top_t**0.9


def test_the_law_is_found_and_predicts_what_it_was_not_fitted_to(measure):
    shapes = [(256, 64), (256, 256), (1024, 64), (1024, 256)]
    results = [result(*shape, full_of(*shape)) for shape in shapes]
    law = measure.fit([*results, result(512, 256, full=1.0)])
    assert dataclasses.astuple(law) == pytest.approx((math.log(0.3), 0.8, -0.9))
    config = result(512, 256, 1.0)["config"]
    assert measure.predicted(law, config, 700) == pytest.approx(1 - math.exp(-700 / full_of(512, 256)))


def test_the_answer_says_how_far_held_back_points_are_off(measure):
    shapes = [(256, 64), (256, 256), (1024, 64), (1024, 256)]
    results = [result(*shape, full_of(*shape)) for shape in shapes]
    readme = "<!-- answer:begin -->\n<!-- answer:end -->\n"
    assert "off by 0.0% in the mean and 0.0% at most" in measure.with_answer(readme, results)
    worse = [*results, result(512, 256, full=1e9)]
    text = measure.with_answer(readme, worse)
    assert "off by 0.0%" not in text
    assert text.count("(held back)") == 4 + 3


def test_the_answer_in_the_readme_is_that_of_the_files(measure):
    results = [json.loads(path.read_text()) for path in sorted((measure.HERE / "results").glob("*.json"))]
    readme = measure.README.read_text(encoding="utf-8")
    assert len(results) == len(measure.RUNS)
    assert measure.with_answer(readme, results) == readme
    assert dataclasses.astuple(LAW) == pytest.approx(dataclasses.astuple(measure.fit(results)), abs=5e-4)
    assert all(result["commit"] and not result["dirty"] for result in results)
