import pytest


@pytest.fixture
def measure(measure_of):
    return measure_of("explain")


def test_rates_are_of_texts_and_of_tokens(measure):
    def explained(fires, kl):
        tokens = [{"fires": fire} for fire in fires]
        return {"fires": any(fires), "tokens": tokens, "kl_all": kl, "num_passes": 2 + any(fires)}

    found = measure.rates([explained([True, False, False], 0.5), explained([False], 0.1)])
    assert (found["num_texts"], found["num_tokens"]) == (2, 4)
    assert (found["texts_that_fire"], found["tokens_that_fire"]) == (0.5, 0.25)
    assert (found["kl_all"], found["kl_all_max"]) == (0.3, 0.5)
    assert found["kl_all_max_where_nothing_fires"] == 0.1
    assert found["num_passes_max"] == 3
