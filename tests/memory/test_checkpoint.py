import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import sparsemem.files
from sparsemem.config import MemoryConfig
from sparsemem.errors import (
    CheckpointError,
    ConfigError,
    ExistsError,
    MissingFileError,
    ModelMismatchError,
    NotAttachedError,
    OutputError,
    SparsememError,
)
from sparsemem.files import file_sha256
from sparsemem.memory.attach import attach_memory, detach_memory, memory_config, memory_layers, pools
from sparsemem.memory.base_model import load_base_model
from sparsemem.memory.checkpoint import CONFIG_FILE, WEIGHTS_FILE, base_weights, load, save

MEMORY = {"layers": (1,), "num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4, "relation_dim": 0}
TOKENS = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base_folder(tiny_model, tiny_tokenizer, tmp_path):
    folder = tmp_path / "base model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base_model(base_folder):
    """A function that loads the base model once more."""
    return lambda: LlamaForCausalLM.from_pretrained(base_folder).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def random_rows(slots, seed):
    return torch.randn(slots, 32, generator=torch.Generator().manual_seed(seed))


def saved(model, tmp_path, **options):
    """A folder with the memory of `model`, some rows written."""
    attach_memory(model, MemoryConfig(**{**MEMORY, **options}))
    for seed, pool in enumerate(pools(model).values()):
        pool.write(torch.arange(0, 64, 2), random_rows(32, seed)[:, : pool.value_dim].contiguous())
    save(model, tmp_path / "memory")
    return tmp_path / "memory"


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": (0, 2)},
        {"layers": (0, 2), "shared_pool": True},
        {"layers": "auto"},
        {"placement": "replace", "value_dim": 16},
    ],
    ids=["one layer", "own pools", "shared pool", "auto", "replace"],
)
def test_save_then_load_gives_the_same_logits(base_model, tmp_path, options):
    model = base_model()
    untouched = logits(model)
    folder = saved(model, tmp_path, **options)
    loaded, tokenizer = load(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), untouched)
    assert memory_config(loaded) == memory_config(model)
    assert not loaded.training
    assert tokenizer("Who?")["input_ids"]


def test_value_scale_and_keys_survive(base_model, tmp_path):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY))
    layer = next(memory_layers(model))
    with torch.no_grad():
        layer.value_scale.fill_(0.37)
        layer.key_bias.uniform_()
    pools(model)["layer_1"].write(torch.arange(64), random_rows(64, 0))
    save(model, tmp_path / "memory")
    loaded = next(memory_layers(load(tmp_path / "memory")[0]))
    state = layer.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_quorum_and_output_survive_and_a_folder_older_than_they_has_neither(base_model, tmp_path):
    config = MemoryConfig(**(MEMORY | {"layers": (0,)}), quorum=0.75, output_depth=0.5)
    model = attach_memory(base_model(), config)
    pools(model)["layer_0"].write(torch.arange(0, 64, 2), random_rows(32, seed=0))
    save(model, tmp_path / "memory")
    again, _ = load(tmp_path / "memory")
    assert [(layer.quorum, layer.output_index) for layer in memory_layers(again)] == [(0.75, 1)]
    assert torch.equal(logits(again), logits(model))
    header = json.loads((tmp_path / "memory" / CONFIG_FILE).read_text())
    del header["memory"]["quorum"], header["memory"]["output_depth"], header["memory"]["relation_dim"]
    (tmp_path / "memory" / CONFIG_FILE).write_text(json.dumps(header))
    older, _ = load(tmp_path / "memory")
    assert [(layer.quorum, layer.output_index) for layer in memory_layers(older)] == [(0.0, 0)]
    assert not torch.equal(logits(older), logits(model))


def test_rows_that_are_still_active_are_saved_too(base_model, tmp_path):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY))
    pools(model)["layer_1"].write(torch.arange(8), random_rows(8, 0))
    active = pools(model)["layer_1"].activate(torch.arange(4, 64))
    with torch.no_grad():
        active.copy_(random_rows(60, 1))
    save(model, tmp_path / "memory")
    rows = pools(load(tmp_path / "memory")[0])["layer_1"].current(torch.arange(64))
    assert torch.equal(rows, pools(model)["layer_1"].current(torch.arange(64)))
    assert pools(model)["layer_1"].active is active


def test_base_table_survives_and_is_not_copied_into_the_overlay(base_model, tmp_path):
    base = random_rows(64, 5)
    model = attach_memory(base_model(), MemoryConfig(**MEMORY), {"layer_1": base})
    pools(model)["layer_1"].write(torch.arange(3), random_rows(3, 6))
    save(model, tmp_path / "memory")
    assert torch.equal(load_file(tmp_path / "memory" / "base.layer_1.safetensors")["values"], base)
    pool = pools(load(tmp_path / "memory")[0])["layer_1"]
    assert torch.equal(pool.base, base)
    assert pool.num_rows == 3
    assert torch.equal(logits(load(tmp_path / "memory")[0]), logits(model))


def test_loading_a_base_table_does_not_let_learning_write_its_file(base_model, tmp_path):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY), {"layer_1": random_rows(64, 5)})
    save(model, tmp_path / "memory")
    file = tmp_path / "memory" / "base.layer_1.safetensors"
    before = file.read_bytes()
    loaded, _ = load(tmp_path / "memory")
    pools(loaded)["layer_1"].write(torch.arange(64), random_rows(64, 6))
    assert file.read_bytes() == before


def test_a_loaded_model_can_be_passed_and_is_changed_in_place(base_model, tmp_path):
    model = base_model()
    folder = saved(model, tmp_path)
    passed = base_model()
    loaded, tokenizer = load(folder, passed)
    assert loaded is passed
    assert tokenizer is None
    assert torch.equal(logits(passed), logits(model))


def test_a_base_model_that_moved_is_found_by_its_new_name(base_model, base_folder, tmp_path):
    model = base_model()
    folder = saved(model, tmp_path)
    base_folder.rename(tmp_path / "moved")
    with pytest.raises(MissingFileError, match="base model is neither"):
        load(folder)
    assert torch.equal(logits(load(folder, str(tmp_path / "moved"))[0]), logits(model))


def test_base_model_name_is_kept_or_given(base_model, base_folder, tmp_path):
    model = base_model()
    folder = saved(model, tmp_path)
    assert json.loads((folder / CONFIG_FILE).read_text())["base_model"] == str(base_folder)
    save(model, tmp_path / "named", base_model="someone/something")
    assert json.loads((tmp_path / "named" / CONFIG_FILE).read_text())["base_model"] == "someone/something"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_model_is_recognised_and_answers_as_itself_in_another_dtype(
    base_model, base_folder, tmp_path, dtype
):
    folder = saved(base_model(), tmp_path)
    loaded, _ = load(folder, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    assert pools(loaded)["layer_1"].rows.dtype == torch.float32
    plain, _ = load_base_model(str(base_folder), dtype=dtype)
    detach_memory(loaded)
    assert torch.equal(logits(loaded), logits(plain))


def test_another_base_model_is_a_mismatch(base_model, tmp_path):
    folder = saved(base_model(), tmp_path)
    other = base_model()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ModelMismatchError, match="pass the model it was attached to"):
        load(folder, other)
    assert not list(memory_layers(other))


@pytest.mark.parametrize("placement", ["add", "replace"])
def test_base_weights_are_those_before_the_memory(base_model, placement):
    model = base_model()
    before = dict(model.named_parameters())
    config = MemoryConfig(**{**MEMORY, "layers": (0, 2)}, shared_pool=True, placement=placement)
    attach_memory(model, config)
    pools(model)["shared"].activate(torch.arange(64))
    found = dict(base_weights(model))
    assert found.keys() == before.keys()
    assert all(found[name] is weight for name, weight in before.items())


def test_only_json_and_safetensors_are_written(base_model, tmp_path):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY), {"layer_1": random_rows(64, 5)})
    save(model, tmp_path / "memory")
    files = sorted(path for path in (tmp_path / "memory").rglob("*") if path.is_file())
    assert [path.name for path in files] == [
        "base.layer_1.safetensors",
        WEIGHTS_FILE,
        CONFIG_FILE,
    ]
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, framework="pt") as file:
                assert file.metadata()["format"].startswith("sparsemem-")


def test_saving_into_a_folder_with_content_is_refused(base_model, tmp_path):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "mine.txt").write_text("mine")
    with pytest.raises(SparsememError, match="choose another folder"):
        save(model, tmp_path / "memory")
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["mine.txt"]


def test_saving_onto_a_file_is_refused(base_model, tmp_path):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY))
    (tmp_path / "memory").write_text("mine")
    with pytest.raises(ExistsError, match="exists already"):
        save(model, tmp_path / "memory")
    assert (tmp_path / "memory").read_text() == "mine"


def test_saving_a_model_without_memory_is_an_error_and_writes_nothing(base_model, tmp_path):
    with pytest.raises(NotAttachedError):
        save(base_model(), tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_full_disk_leaves_no_folder_that_could_be_taken_for_a_memory(base_model, tmp_path, monkeypatch):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY))

    def full_disk(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sparsemem.files, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        save(model, tmp_path / "memory")
    assert not [path for path in tmp_path.glob("memory/*") if path.is_file()]
    monkeypatch.undo()
    save(model, tmp_path / "memory")
    assert load(tmp_path / "memory")


def flip_a_byte_of_the_header(path):
    content = bytearray(path.read_bytes())
    content[8] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "base.layer_1.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "newer", "missing"])
def test_a_damaged_file_is_named_in_the_right_error(base_model, tmp_path, name, damage):
    model = attach_memory(base_model(), MemoryConfig(**MEMORY), {"layer_1": random_rows(64, 5)})
    folder = tmp_path / "memory"
    save(model, folder)
    path = folder / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        flip_a_byte_of_the_header(path)
    elif damage == "missing":
        path.unlink()
    else:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        changed = {"foreign": {"format": "pt"}, "newer": {"format_version": "99"}}[damage]
        save_file(load_file(path), path, metadata={**header, **changed})
    kind = MissingFileError if damage == "missing" else CheckpointError
    with pytest.raises(kind, match=path.name):
        load(folder, base_model())


@pytest.mark.parametrize(
    "change",
    [{"layers.1.keys": None}, {"pools.layer_1.rows": None}, {"layers.1.keys": (2, 2, 9, 4)}, {"more": (1,)}],
    ids=["no keys", "no rows", "other shape", "unknown tensor"],
)
def test_weights_that_do_not_fit_the_config_are_an_error(base_model, tmp_path, change):
    folder = saved(base_model(), tmp_path)
    ((name, shape),) = change.items()
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors.pop(name, None)
    if shape:
        tensors[name] = torch.zeros(shape)
    header = {"format": "sparsemem-memory", "format_version": "1"}
    save_file(tensors, folder / WEIGHTS_FILE, metadata=header)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["weights_sha256"] = file_sha256(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name):
        load(folder, base_model())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "peft"}, CheckpointError, "not a sparsemem-memory file"),
        ({"format_version": 5}, CheckpointError, "upgrade sparsemem"),
        ({"format_version": 1}, CheckpointError, "another order"),
        ({"format_version": None}, CheckpointError, "upgrade sparsemem"),
        ({"memory": {**MEMORY, "num_slots": 64}}, ConfigError, "num_slots"),
        ({"memory": {**MEMORY, "num_keys": 9}}, CheckpointError, "keys"),
    ],
    ids=["foreign", "newer", "older", "no version", "unknown option", "other size"],
)
def test_a_config_that_cannot_be_used_is_an_error(base_model, tmp_path, change, error, message):
    folder = saved(base_model(), tmp_path)
    edit_config(folder, **change)
    with pytest.raises(error, match=message):
        load(folder, base_model())


@pytest.mark.parametrize("key", ["base_model", "base_fingerprint", "memory"])
def test_a_config_that_lacks_something_says_what(base_model, tmp_path, key):
    folder = saved(base_model(), tmp_path)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        load(folder, base_model())


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": "sparsemem-mem'])
def test_a_config_that_is_no_json_object_is_an_error(base_model, tmp_path, content):
    folder = saved(base_model(), tmp_path)
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=CONFIG_FILE):
        load(folder, base_model())


def test_a_folder_without_config_or_at_all_is_an_error(base_model, tmp_path):
    folder = saved(base_model(), tmp_path)
    (folder / CONFIG_FILE).unlink()
    for missing in (folder, tmp_path / "nowhere"):
        with pytest.raises(MissingFileError, match="sparsemem attach MODEL"):
            load(missing, base_model())
