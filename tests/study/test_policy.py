import pytest

from sparsemem.errors import ConfigError, MissingFileError
from sparsemem.study.policy import Policy, load_policy


def test_a_policy_is_read_from_yaml(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("max_forgetting: {nq: 0.01}\nretries: 1\nsources: ['/a/*']\n", encoding="utf-8")
    policy = load_policy(path)
    assert policy.max_forgetting == {"nq": 0.01}
    assert (policy.retries, tuple(policy.sources)) == (1, ("/a/*",))
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert load_policy(path) == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_forgeting: {nq: 0.01}", "unknown option 'max_forgeting'"),
        ("max_forgetting: 0.01", "must name a number for each probe"),
        ("max_forgetting: {nq: a lot}", "must name a number"),
        ("retries: -1", "cannot be"),
        ("refresh_below: 2", "cannot be"),
        ("contradictions: ignore", "use refuse or replace"),
        ("- a\n- b", "holds a list"),
        ("a: [", "not valid YAML"),
        ("retries: many", "wrong type"),
    ],
)
def test_what_is_no_policy_is_told(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_policy(path)


def test_a_missing_policy_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.yaml"):
        load_policy(tmp_path / "none.yaml")


def test_budgets_name_probes_that_are_measured():
    with pytest.raises(ConfigError, match="budget for probe 'nq', measured are wiki"):
        Policy(min_retention={"nq": 0.9}).check_probes(["wiki"])
