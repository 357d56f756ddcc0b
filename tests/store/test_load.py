import pytest
import torch

from sparsemem.errors import CheckpointError, HistoryError, PoolMismatchError
from sparsemem.memory.attach import detach_memory, memory_layers, pools
from sparsemem.memory.checkpoint import save
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load, overlaid
from sparsemem.store.objects import StoredRows
from sparsemem.store.state import replay, write

from .conftest import Learner

TOKENS = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture
def taught(model_folder, tiny_model, attached, tmp_path):
    """A folder with two commits on `main` and one on `b`, and the logits of each version on its day."""
    save(attached, tmp_path / "m", base_model=str(model_folder))
    store = DeltaStore(tmp_path / "m")
    pool = pools(attached)["layer_1"]
    learner = Learner(store, pool)
    then = {"attached": logits(attached)}
    for name, slots in (("1", range(0, 40)), ("2", range(30, 64))):
        learner.commit(slots)
        then[name] = logits(attached)
    store.create_ref("branch", "b", "1")
    store.checkout("b")
    learner.commit(range(50, 60))
    then["b"] = logits(attached)
    store.checkout("main")
    return store, then


def test_every_version_gives_the_logits_of_its_day(taught):
    store, then = taught
    assert len({value.sum().item() for value in then.values()}) == 4
    for revision, expected in then.items():
        model, tokenizer = load(store.folder, revision=revision if revision != "b" else "b")
        assert torch.equal(logits(model), expected)
        assert tokenizer is not None
    assert torch.equal(logits(load(store.folder)[0]), then["2"])
    store.checkout("b")
    assert torch.equal(logits(load(store.folder)[0]), then["b"])


def test_an_unknown_version_is_named_before_the_model_is_loaded(taught, monkeypatch):
    monkeypatch.setattr("sparsemem.memory.checkpoint.load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(HistoryError, match="'nonsense'"):
        load(taught[0].folder, revision="nonsense")


def test_a_damaged_object_is_found_at_load(taught):
    store, _ = taught
    path = store.objects.path(store.log()[1].object)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=path.name):
        load(store.folder)


def test_a_history_of_another_memory_leaves_the_model_as_it_was(taught, tiny_model):
    store, _ = taught
    detach_memory(tiny_model)
    original = logits(tiny_model)
    rows = torch.ones(1, 8)
    wrong = {"layer_1": StoredRows(torch.tensor([1]), rows, torch.tensor([0]), rows, torch.tensor([0]), 64)}
    with store.database.writing() as connection:
        sha = store.objects.stage(wrong)
        connection.execute("UPDATE commits SET object = ?", (sha,))
    with pytest.raises(PoolMismatchError, match="64 x 8, here it is 64 x 32"):
        load(store.folder, tiny_model)
    assert not list(memory_layers(tiny_model))
    assert torch.equal(logits(tiny_model), original)


def test_a_version_is_only_written_to_the_rows_it_began_with(taught):
    store, _ = taught
    model, _ = load(store.folder, revision="1")
    with pytest.raises(PoolMismatchError, match="begins with other rows"):
        write(store.state(store.resolve("b")), pools(model))


def test_overlays_stack_and_go_without_a_trace(taught):
    store, then = taught
    model, _ = load(store.folder, revision="attached")
    company, user = store.state(store.resolve("1")), store.state(store.resolve("b"))
    for _ in range(2):
        with overlaid(model, [company]):
            assert torch.equal(logits(model), then["1"])
            with overlaid(model, [user]):
                assert torch.equal(logits(model), then["b"])
            assert torch.equal(logits(model), then["1"])
        assert torch.equal(logits(model), then["attached"])
        assert pools(model)["layer_1"].num_rows == 0
    with overlaid(model, [company, user]):
        assert torch.equal(logits(model), then["b"])
    with pytest.raises(KeyboardInterrupt), overlaid(model, [user]):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), then["attached"])


def test_an_overlay_that_does_not_fit_is_refused_and_the_first_taken_off(taught):
    store, then = taught
    model, _ = load(store.folder, revision="attached")
    rows = torch.ones(1, 8)
    wrong = replay(
        [{"layer_1": StoredRows(torch.tensor([1]), rows, torch.tensor([0]), rows, torch.tensor([0]), 64)}]
    )
    with pytest.raises(PoolMismatchError), overlaid(model, [store.state(store.resolve("1")), wrong]):
        pass
    assert torch.equal(logits(model), then["attached"])
