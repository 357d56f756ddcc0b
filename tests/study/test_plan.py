import json

import pytest
import torch

from sparsemem.errors import ConfigError, MissingFileError
from sparsemem.memory.attach import pools
from sparsemem.slots.capacity import LAW, Capacity
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.study.explain import explain, taught_updates
from sparsemem.study.learn import learn
from sparsemem.study.plan import ACTIONS, most_pressing, plan_folder


def test_a_new_folder_is_empty(folder):
    result = plan_folder(folder)
    assert json.loads(json.dumps(result)) == result
    assert (result["num_updates"], result["num_facts"]) == (0, 0)
    pool = result["pools"]["layer_1"]
    assert (pool["num_slots"], pool["num_written"], pool["hit_share"]) == (64, 0, 0)
    assert result["disk_bytes"]["history"] == result["memory_bytes"]["rows"] == 0
    assert result["memory_bytes"]["map"] == 4 * 64


def test_figures_are_those_of_the_folder(folder, facts, config):
    for fact in facts:
        learn(folder, [fact], probes=[], config=config)
    result = plan_folder(folder)
    assert (result["num_updates"], result["num_facts"]) == (2, 2)
    model, _ = load(folder)
    written = pools(model)["layer_1"].written_ids
    store = DeltaStore(folder)
    first, second = (store.delta(commit.id).changes["layer_1"].slot_ids for commit in store.log())
    usage = load_usage(folder / USAGE_FILE).pools["layer_1"]
    pool = result["pools"]["layer_1"]
    assert pool["num_written"] == len(written) > 0
    assert pool["fill"] == len(written) / 64
    assert pool["num_shared"] == len(set(first.tolist()) & set(second.tolist()))
    assert pool["hit_share"] == pytest.approx(int(usage.reads[written].sum()) / int(usage.reads.sum()))
    assert result["memory_bytes"]["rows"] == pools(model)["layer_1"].num_rows * ((1 + 2 * 32) * 4 + 4)
    assert result["memory_bytes"]["keys"] == sum(
        p.numel() * 4 for name, p in model.named_parameters() if ".memory." in name
    )
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert sum(result["disk_bytes"].values()) == on_disk
    assert result["disk_bytes"]["history"] > 0
    assert result["disk_bytes"]["usage"] == (folder / USAGE_FILE).stat().st_size
    assert (pool["num_facts"], pool["slots_per_fact"], pool["has_fitted_keys"]) == (2, config.top_t, True)
    assert pool["taken"] == LAW.taken(2, 64, config.top_t)
    assert pool["room"] == max(0, int(LAW.num_facts(0.5, 64, config.top_t)) - 2)
    assert result["recommendation"] in ACTIONS
    assert torch.equal(written, pools(load(folder)[0])["layer_1"].written_ids)


def capacity(hub_share=0.1, num_written=10, num_facts=2):
    return Capacity(
        num_slots=100,
        num_written=num_written,
        num_shared=0,
        num_facts=num_facts,
        slots_per_fact=5,
        has_fitted_keys=False,
        hub_share=hub_share,
        hit_share=0.01,
    )


def test_the_pool_that_needs_most_is_named():
    pools = {"layer_1": capacity(num_facts=80), "layer_2": capacity(hub_share=0.9), "layer_3": capacity()}
    action, reason = most_pressing(pools)
    assert action == "other keys"
    assert reason.startswith("layer_2: ")
    assert most_pressing({"layer_3": capacity()})[1].startswith("10.0% of the slots")


def test_how_much_fires_is_counted_as_explain_does(folder, facts, config, background, texts):
    assert plan_folder(folder, [str(background)])["pools"]["layer_1"]["fires"] == 0
    learn(folder, facts, probes=[], config=config)
    result = plan_folder(folder, [str(background)])
    model, tokenizer = load(folder)
    usage, updates = load_usage(folder / USAGE_FILE), taught_updates(folder)
    tokens = [token for text in texts for token in explain(model, tokenizer, usage, updates, text)["tokens"]]
    fires = sum(token["fires"] for token in tokens)
    assert fires > 0
    assert result["pools"]["layer_1"]["fires"] == pytest.approx(fires / len(tokens))
    assert plan_folder(folder)["pools"]["layer_1"]["fires"] is None


def test_a_budget_decides_how_many_more_facts_fit(folder, facts, config, background):
    learn(folder, facts, probes=[], config=config)
    fires = plan_folder(folder, [str(background)])["pools"]["layer_1"]["fires"]
    strict = plan_folder(folder, [str(background)], budget=fires / 2)
    assert (strict["recommendation"], strict["pools"]["layer_1"]["room"]) == ("more slots", 0)
    assert "of the tokens of ordinary text (budget" in strict["reason"]
    with pytest.raises(ConfigError, match="budget=0 is no share"):
        plan_folder(folder, [str(background)], budget=0)
    with pytest.raises(ConfigError, match="give some, to measure it on"):
        plan_folder(folder, budget=0.1)


def test_facts_of_which_only_hashes_are_kept_count_and_those_taken_back_do_not(folder, facts, config):
    learn(folder, facts[:1], probes=[], config=config, hash_facts=True)
    learn(folder, facts[1:], probes=[], config=config, hash_facts=True)
    assert plan_folder(folder)["pools"]["layer_1"]["num_facts"] == 2
    DeltaStore(folder).undo()
    assert plan_folder(folder)["pools"]["layer_1"]["num_facts"] == 1


def test_a_background_that_is_not_there_is_named_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("sparsemem.study.plan.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(MissingFileError, match=r"none\.txt"):
        plan_folder(folder, ["none.txt"])


def test_a_folder_without_a_memory_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="sparsemem attach"):
        plan_folder(tmp_path)
