import dataclasses
import io
import json
import os
import random
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, MissingFileError
from sparsemem.memory.attach import pools
from sparsemem.store import proposals
from sparsemem.store.history import DeltaStore
from sparsemem.store.integrity import verify
from sparsemem.store.load import load
from sparsemem.study.learn import learn
from sparsemem.study.policy import Policy
from sparsemem.study.sources import facts_from
from sparsemem.study.stream import approve, stream

NAMES = ("Zed", "Quz", "Jov", "Wix", "Pym")


def row(name, answer="Ana"):
    return {"question": f"Who owns {name}?", "answer": answer, "subject": name}


def write(path, rows, mode="w"):
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "facts.jsonl", [row(name) for name in NAMES])


def taught(folder):
    store = DeltaStore(folder)
    return [fact["subject"] for fact in store.facts(store.head())]


def test_each_batch_is_a_commit_and_no_row_is_learned_twice(folder, config, source, tmp_path):
    reports = []
    counts = stream(folder, source, batch_size=2, probes=[], config=config, on_update=reports.append)
    assert counts == {"learned": 5, "refused": 0, "proposed": 0, "known": 0, "updates": 3}
    assert [report["update"] for report in reports] == [1, 2, 3]
    assert taught(folder) == list(NAMES)
    store = DeltaStore(folder)
    assert [len(store.details(c.id)["facts"]) for c in reversed(store.log())] == [2, 2, 1]
    assert store.details(store.head())["source"] == source
    more = write(tmp_path / "facts.jsonl", [row("Zed"), row("New"), row("New")], "a")
    again = stream(folder, more, batch_size=2, probes=[], config=config)
    assert again == {"learned": 1, "refused": 0, "proposed": 0, "known": 7, "updates": 1}
    assert verify(DeltaStore(folder)) == []


def test_a_stream_that_was_stopped_goes_on_where_it_was(folder, config, source):
    def stop(report):
        if report["update"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(folder, source, batch_size=1, probes=[], config=config, on_update=stop)
    assert taught(folder) == ["Zed", "Quz"]
    stream(folder, source, batch_size=1, probes=[], config=config)
    assert taught(folder) == list(NAMES)


def test_a_stream_is_what_the_same_updates_one_by_one_are(folder, config, source, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    stream(folder, source, batch_size=2, probes=[], config=config)
    for start in (0, 2, 4):
        learn(copy, [Fact(**row(name)) for name in NAMES[start : start + 2]], probes=[], config=config)
    rows = [pools(load(each)[0])["layer_1"].current(torch.arange(64)) for each in (folder, copy)]
    torch.testing.assert_close(*rows)


def test_what_was_reverted_is_not_learned_again(folder, config, source):
    from sparsemem.store.merge import commit_change, revert

    stream(folder, source, batch_size=5, probes=[], config=config)
    store = DeltaStore(folder)
    commit_change(store, revert(store, "HEAD"), "", "revert")
    assert stream(folder, source, probes=[], config=config)["known"] == 5
    assert taught(folder) == []


def test_budgets_are_kept_or_the_update_is_refused(folder, config, source, tmp_path, texts):
    wiki = tmp_path / "wiki.txt"
    wiki.write_text("\n".join(texts[:5]), encoding="utf-8")
    options = {"probes": [f"wiki={wiki}"], "config": config, "batch_size": 5}
    policy = Policy(max_forgetting={"wiki": -1.0}, retries=1)
    reports = []
    counts = stream(folder, source, policy=policy, on_update=reports.append, **options)
    assert (counts["refused"], counts["updates"]) == (5, 0)
    assert len(DeltaStore(folder)) == 0
    assert "wiki forgot" in reports[0]["reason"]
    assert reports[0]["probes"]["wiki"]["before"] > 0
    kept = proposals.listed(DeltaStore(folder), proposals.REFUSED)
    assert sorted(each["fact"]["subject"] for each in kept) == sorted(NAMES)
    assert "wiki forgot" in kept[0]["reason"]
    assert stream(folder, source, policy=policy, **options)["known"] == 5, "refused ones are not tried again"
    counts = approve(folder, ["all", *(each["sha"] for each in kept)], probes=[], config=config)
    assert counts["learned"] == 5
    assert len(proposals.listed(DeltaStore(folder), proposals.APPROVED)) == 5


def test_an_update_over_budget_is_tried_again_with_smaller_steps(folder, config, source, monkeypatch):
    seen = []

    def violations(_policy, _report, _attached):
        return [] if len(seen) == 2 else ["too much"]

    from sparsemem.study.session import Session

    attempt = Session.attempt
    monkeypatch.setattr(Policy, "violations", violations)
    monkeypatch.setattr(
        Session,
        "attempt",
        lambda self, f, p, c, **kw: seen.append((c.lr, c.top_t)) or attempt(self, f, p, c, **kw),
    )
    stream(folder, source, batch_size=5, probes=[], config=config, policy=Policy())
    assert seen == [(config.lr, 6), (config.lr / 2, 3)]
    store = DeltaStore(folder)
    assert store.details(store.head())["retries"] == 1
    assert store.details(store.head())["config"]["top_t"] == 3


def test_total_forgetting_is_counted_from_the_first_update():
    policy = Policy(max_total_forgetting={"nq": 0.05, "wiki": 0.05})
    report = {
        "probes": {
            "nq": {"metric": "f1", "before": 0.97, "after": 0.96, "forgetting": 0.01},
            "wiki": {"metric": "perplexity", "before": 10.3, "after": 10.4, "forgetting": 0.01},
        }
    }
    assert policy.violations(report, {"nq": 1.0, "wiki": 10.0}) == []
    assert policy.violations(report, {"nq": 1.1, "wiki": 10.0}) == [
        "nq forgot 12.73% since it was attached, allowed 5.00%"
    ]
    assert policy.violations(report, {"nq": 0.5, "wiki": 9.0}) == [
        "wiki forgot 15.56% since it was attached, allowed 5.00%"
    ]
    kept = Policy(min_retention={"nq": 0.98})
    report["probes"]["nq"]["retention"] = 0.97
    assert kept.violations(report, {}) == ["nq kept 97.00%, required 98.00%"]


def test_a_contradiction_is_refused_or_recorded_as_a_replacement(folder, config, tmp_path):
    stream(folder, write(tmp_path / "a.jsonl", [row("Zed")]), probes=[], config=config)
    other = write(tmp_path / "b.jsonl", [row("Zed", "Bo"), row("zed "), row("Quz")])
    counts = stream(folder, other, probes=[], config=config)
    assert (counts["learned"], counts["refused"]) == (2, 1)
    store = DeltaStore(folder)
    (waiting,) = proposals.listed(store, proposals.REFUSED)
    assert waiting["fact"]["answer"] == "Bo"
    assert "contradicts" in waiting["reason"]
    third = write(tmp_path / "c.jsonl", [row("Quz", "Cy")])
    counts = stream(folder, third, probes=[], config=config, policy=Policy(contradictions="replace"))
    assert counts["learned"] == 1
    assert {fact["subject"]: fact["answer"] for fact in store.facts(store.head())}["Quz"] == "Cy"
    (old,) = store.details(store.head())["forgets"]
    assert old in {fact["sha"] for fact in store.facts(store.resolve("HEAD~1"))}
    approve(folder, [waiting["sha"][:8]], probes=[], config=config)
    assert "Bo" in {fact["answer"] for fact in store.facts(store.head())}


def test_learn_wants_contradictions_confirmed(folder, config):
    learn(folder, [Fact(**row("Zed"))], probes=[], config=config)
    other = [Fact(**row("Zed", "Bo"), id="x.jsonl:3")]
    with pytest.raises(
        DataError, match=r"x\.jsonl:3: 'Who owns Zed\?' is 'Bo', but 'Ana' was taught; .*--replace"
    ):
        learn(folder, other, probes=[], config=config)
    assert len(DeltaStore(folder)) == 1
    learn(folder, [Fact(**row("Zed"), aliases=("Bo",))], probes=[], config=config)
    learn(folder, other, probes=[], config=config, replace=True)
    store = DeltaStore(folder)
    assert [fact["answer"] for fact in store.facts(store.head())][-1] == "Bo"


def test_earlier_facts_are_asked_again_and_taught_again_when_they_fade(folder, config, source):
    reports = []
    policy = Policy(retest=-1, refresh_below=1.0)  # tiny models know nothing: everything has faded
    stream(folder, source, batch_size=2, probes=[], config=config, policy=policy, on_update=reports.append)
    assert [report.get("earlier", {}).get("num") for report in reports] == [None, 2, 4]
    store = DeltaStore(folder)
    assert [len(store.details(c.id)["facts"]) for c in reversed(store.log())] == [2, 2, 3]
    assert taught(folder).count("Zed") == 1
    sampled = []
    other = dataclasses.replace(policy, retest=1, refresh_below=0.0)
    stream(folder, _one_more(source), probes=[], config=config, policy=other, on_update=sampled.append)
    assert sampled[0]["earlier"]["num"] == 1


def test_of_a_document_what_was_read_in_it_is_asked_again(folder, config, tmp_path):
    path = tmp_path / "grows.txt"
    path.write_text("The tin of Zedek belongs to Quzar, and that of Anatol to Bonn.\n", encoding="utf-8")
    policy, reports = Policy(retest=-1, refresh_below=1.0), []
    stream(folder, str(path), probes=[], config=config, policy=policy)
    for line in ("Ida went to Rome.\n", "Quist went to Oslo.\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
        stream(folder, str(path), probes=[], config=config, policy=policy, on_update=reports.append)
    assert [report["earlier"]["num"] for report in reports] == [4, 4]


def _one_more(source):
    return write(Path(source), [row("New")], "a")


def test_proposed_facts_wait_for_a_decision(folder, config, source):
    counts = stream(folder, source, probes=[], config=config, propose=True)
    assert (counts["proposed"], counts["learned"], len(DeltaStore(folder))) == (5, 0, 0)
    store = DeltaStore(folder)
    pending = proposals.listed(store, proposals.PENDING)
    proposals.decide(store, [pending[0]["fact"]], proposals.REJECTED)
    assert approve(folder, ["all"], probes=[], config=config)["learned"] == 4
    assert len(taught(folder)) == 4
    assert stream(folder, source, probes=[], config=config)["known"] == 5, "rejected is rejected"
    actions = [line["action"] for line in store.journal()]
    assert (actions.count("pending"), actions.count("rejected"), actions.count("approved")) == (5, 1, 4)


def test_only_allowed_sources_are_read(folder, config, source):
    with pytest.raises(DataError, match=r"none of the allowed sources \(/approved/\*\)"):
        stream(folder, source, probes=[], config=config, policy=Policy(sources=["/approved/*"]))
    allowed = Policy(sources=["/approved/*", f"{Path(source).parent}/*"])
    assert stream(folder, source, probes=[], config=config, policy=allowed)["learned"] == 5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, ConfigError),
        ({"source": "none.jsonl"}, MissingFileError),
        ({"method": "lora"}, ConfigError),
        ({"policy": Policy(max_forgetting={"nq": 0.1})}, ConfigError),
        ({"prompt": "x"}, ConfigError),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_the_model_is_loaded(folder, config, source, monkeypatch, options, error):
    monkeypatch.setattr("sparsemem.study.session.load", lambda *_: pytest.fail("the model was loaded"))
    given = {"probes": [], "config": config, **options}
    if method := given.pop("method", None):
        given["config"] = dataclasses.replace(config, method=method)
    with pytest.raises(error):
        stream(folder, given.pop("source", source), **given)


def test_a_bad_row_stops_the_stream_and_what_was_learned_stays(folder, config, source):
    with Path(source).open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"facts\.jsonl:6: not valid JSON"):
        stream(folder, source, batch_size=2, probes=[], config=config)
    assert taught(folder) == ["Zed", "Quz", "Jov", "Wix"]


def names(facts):
    return [fact and fact.subject for fact in facts]


def test_a_growing_file_is_read_line_by_whole_line(tmp_path):
    path = tmp_path / "grows.jsonl"
    write(path, [row("Zed")])
    facts = facts_from(str(path), follow=True, poll_seconds=0.01)
    assert (next(facts).subject, next(facts)) == ("Zed", None)
    text = json.dumps(row("Quz"))
    with path.open("a", encoding="utf-8") as file:
        file.write(text[:10])
    assert next(facts) is None
    with path.open("a", encoding="utf-8") as file:
        file.write(text[10:] + "\n\n")
    assert (next(facts).subject, next(facts)) == ("Quz", None)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row("Jov")))
    assert names(facts_from(str(path))) == ["Zed", "Quz", "Jov"], "without --follow the last line counts"


def test_a_folder_is_read_by_name_and_new_files_as_they_come(tmp_path):
    write(tmp_path / "b.jsonl", [row("Quz")])
    write(tmp_path / "a.jsonl", [row("Zed")])
    (tmp_path / "notes.md").write_text("not facts", encoding="utf-8")
    (tmp_path / "c.txt").write_text("A document.\n", encoding="utf-8")
    assert names(facts_from(str(tmp_path))) == ["Zed", "Quz", None]
    facts = facts_from(str(tmp_path), follow=True, poll_seconds=0.01)
    assert [next(facts) is None for _ in range(4)] == [False, False, False, True]
    write(tmp_path / "a.jsonl", [row("Jov")], "a")
    assert (next(facts).subject, next(facts)) == ("Jov", None)


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(row("Zed")) + "\n" + json.dumps(row("Quz"))))
    assert names(facts_from("-")) == ["Zed", "Quz"]


def test_following_learns_what_is_appended(folder, config, tmp_path):
    path = tmp_path / "grows.jsonl"
    write(path, [row("Zed")])
    learned = threading.Event()

    def on_update(report):
        if report["update"] == 1:
            write(path, [row("Quz")], "a")
        else:
            learned.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(
            folder, str(path), probes=[], config=config, follow=True, poll_seconds=0.01, on_update=on_update
        )
    assert learned.is_set()
    assert taught(folder) == ["Zed", "Quz"]


def num_commits(folder):
    store = DeltaStore(folder)
    try:
        return len(store)
    finally:
        store.database.close()  # SQLite does not stand a fork with an open connection


def test_a_stream_that_is_killed_again_and_again_learns_each_row_once(folder, config, source):
    chance, num_kills, done = random.Random(0), 0, False
    while not done:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                stream(folder, source, batch_size=1, probes=[], config=config)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        # Killed by what is there, not by the clock: a quick machine is through before any time that is set.
        while not done and (num_kills >= 4 or num_commits(folder) < num_kills):
            ended, status = os.waitpid(child, os.WNOHANG)
            assert status == 0, "the stream failed: see what it says above"
            done = ended == child
            time.sleep(0.005)
        time.sleep(0.0 if done else chance.uniform(0, 0.05))
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            num_kills += 1
        store = DeltaStore(folder)
        assert verify(store) == []
        store.database.close()
    assert num_kills > 0
    store = DeltaStore(folder)
    by_commit = [store.details(commit.id)["facts"] for commit in reversed(store.log())]
    assert [row["subject"] for rows in by_commit for row in rows] == list(NAMES)
