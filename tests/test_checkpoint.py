"""Checkpoints are found, written whole, read without running anything, and checked."""

import argparse
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_window, sharp_model
from foreign import held_out, make_foreign_run
from hypothesis import given
from hypothesis import strategies as st

from ad.checkpoints import (
    checkpoint_step,
    checkpoints_in,
    find_checkpoint,
    is_dark_room,
    load_checkpoint,
    read_file,
    save_checkpoint,
    split_of,
)
from config import EnvConfig
from historylens.agent import pick_device
from historylens.common.errors import UserError
from historylens.common.settings import to_dict


def touch(path, age=0):
    """An empty file, written `age` seconds before now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (1_700_000_000 - age,) * 2)
    return path


@pytest.fixture
def content(tiny_config):
    """What a checkpoint of a tiny model holds."""
    return {
        "step": 30,
        "config": to_dict(tiny_config, EnvConfig(grid_size=5)),
        "model": sharp_model(tiny_config).state_dict(),
        "optimizer": None,
        "lr_sched": None,
        "goals": {"train": [[0, 0]], "validation": [[1, 2]], "test": [[4, 4], [0, 3]]},
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "ckpt-30.pt"


def loaded(path, content, **config):
    """The checkpoint of some content, after a change of its config."""
    save_checkpoint(path, content | {"config": content["config"] | config})
    return load_checkpoint(path)


def error_of(path, content=None) -> str:
    """The one-line error of loading a file, after writing `content` to it if there is any."""
    if content is not None:
        save_checkpoint(path, content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def same_logits(one, other):
    context, queries = random_window(one.config, 3, 11)
    with torch.no_grad():
        return torch.equal(one(*context, queries[:, -1]), other(*context, queries[:, -1]))


# Finding


def test_steps_are_read_from_names_and_ordered_as_numbers(tmp_path):
    for name in ("ckpt-10000.pt", "ckpt-9000.pt", "ckpt-0500.pt", "ckpt-100000.pt"):
        touch(tmp_path / name, age=len(name))
    for name in ("ckpt-last.pt", ".ckpt-999999.pt.part", "resume.pt", "ckpt-.pt", "ckpt--1.pt"):
        touch(tmp_path / name)
        assert checkpoint_step(tmp_path / name) is None
    assert [checkpoint_step(p) for p in checkpoints_in(tmp_path)] == [500, 9_000, 10_000, 100_000]


@pytest.mark.parametrize(
    ("ages", "where", "expected", "reason"),
    [
        ({"ckpt-10000.pt": 50, "ckpt-9000.pt": 0}, ".", "ckpt-10000.pt",
         "highest step of 2 in the run asked for"),
        ({"a/ckpt-10000.pt": 20, "b/ckpt-2000.pt": 10, "b/ckpt-300.pt": 0, "c/ckpt-90000.pt": 5},
         ".", "b/ckpt-2000.pt", "last written of 3 runs, highest step of 2"),
        ({"a/ckpt-1.pt": 0, "empty/x": 0, "notes.txt": 0}, ".", "a/ckpt-1.pt",
         "the only run, highest step of 1"),
        ({"ckpt-9.pt": 0, "weights.bin": 0}, "weights.bin", "weights.bin", "the file asked for"),
    ],
    ids=["run", "runs", "one-run", "file"],
)  # fmt: skip
def test_the_latest_checkpoint_is_found_and_why_is_said(tmp_path, ages, where, expected, reason):
    for name, age in ages.items():
        touch(tmp_path / name, age)
    assert find_checkpoint(str(tmp_path / where)) == (tmp_path / expected, reason)


@pytest.mark.parametrize("where", [".", "nowhere", "empty"])
def test_no_checkpoint_says_to_train_first(tmp_path, where):
    touch(tmp_path / "empty" / "resume.pt")
    with pytest.raises(UserError, match=r"No checkpoint found.*`python train\.py`"):
        find_checkpoint(tmp_path / where)


# Writing


def test_a_checkpoint_survives_a_round_trip(path, content, tiny_config):
    found = loaded(path, content)
    assert (found.path, found.step, found.goals) == (path, 30, content["goals"])
    assert found.config == content["config"]
    assert found.model.config == tiny_config
    assert not found.model.training
    assert same_logits(found.model, sharp_model(tiny_config))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("stage", ["writing", "renaming"])
def test_a_failed_save_leaves_the_old_file_and_no_part_of_a_new_one(
    path, content, monkeypatch, stage
):
    save_checkpoint(path, content)
    before = path.read_bytes()

    def full_disk(content, file):
        if stage == "writing":
            file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(*((torch, "save") if stage == "writing" else (os, "replace")), full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, content | {"step": 31})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Reading


class Intruder:
    """Pickled code: reading it without care would make a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, path, content, writer):
    target = tmp_path / "executed"
    bad = content | {"goals": Intruder(target)}
    save_checkpoint(path, bad)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
    assert "cannot be read as a checkpoint" in error_of(path)
    assert not target.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # the file was indeed dangerous


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error_with_its_size(path, content, part):
    save_checkpoint(path, content)
    size = int(part * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    message = error_of(path)
    assert f"({size:,} bytes) cannot be read as a checkpoint" in message
    assert "truncated" in message


def test_what_is_no_checkpoint_is_an_error_that_names_it(path, content):
    assert "No checkpoint found" in error_of(path)
    path.parent.mkdir()
    path.write_text("not a checkpoint")
    assert "cannot be read as a checkpoint" in error_of(path)
    assert "got one with pos_embedding" in error_of(path, dict(content["model"]))
    assert "got Tensor" in error_of(path, torch.zeros(3))
    with pytest.raises(UserError, match="No checkpoint found"):
        read_file(path.parent)


@pytest.mark.parametrize("missing", ["step", "config", "model"])
def test_a_dict_without_a_needed_key_is_not_a_checkpoint(path, content, missing):
    message = error_of(path, {k: v for k, v in content.items() if k != missing})
    assert "is not a checkpoint of an AD model: expected a dict with step, config, model" in message


@pytest.mark.parametrize(
    ("value", "name"),
    [(Path("runs"), r"pathlib\S*Path"), (argparse.Namespace(x=1), "argparse.Namespace")],
)
def test_an_object_in_the_config_is_named(path, content, value, name):
    message = error_of(path, content | {"config": content["config"] | {"log_dir": value}})
    assert re.search(f"cannot be read as a checkpoint: .* got a {name}, which is not", message)
    assert "save it again without that" in message


def test_numbers_of_numpy_are_read_as_plain_ones(path, content):
    plain = {"tf_n_head": 2, "lr": 0.5, "flag": True, "reward": 1.25}
    kinds = (np.int64, np.float32, np.bool_, np.float64)
    config = {name: kind(plain[name]) for name, kind in zip(plain, kinds, strict=True)}
    found = loaded(path, content | {"step": np.int64(7), "best": np.float64(3)}, **config)
    assert type(found.step) is int
    for name, value in plain.items():
        assert found.config[name] == value
        assert type(found.config[name]) is type(value)


# Tensors against config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_transit": 13}, r"pos_embedding of shape \(1, 13, 16\), got \(1, 12, 16\)"),
        ({"tf_n_embd": 8}, r"pos_embedding of shape \(1, 12, 8\), got \(1, 12, 16\)"),
        ({"grid_size": 9}, r"embed_query_state.weight of shape \(81, 16\), got \(25, 16\)"),
        ({"num_actions": 4}, r"embed_context.weight of shape \(16, 9\), got \(16, 10\)"),
        ({"tf_n_layer": 3}, r"do not fit its config: .*layers.2.* got none \(and 11 more\)"),
        ({"tf_n_layer": 1}, r"layers.1.* of shape none, got .* \(and 11 more\)"),
        ({"tf_n_head": 3}, "expected tf_n_head to divide tf_n_embd in its config"),
        ({"num_actions": None}, "its config does not describe a model"),
        ({"dim_states": 3}, "its config does not describe a model"),
        ({"tf_dropout": "low"}, "its config does not describe a model"),
        ({"tf_dropout": 2}, "its config does not describe a model"),
        *(
            ({name: value}, f"expected {name} of 1 or more in its config, got {value!r}")
            for name in ("n_transit", "tf_n_layer", "tf_n_head", "tf_n_embd", "grid_size")
            for value in (None, "many", 0, -1)
        ),
    ],
)
def test_a_config_that_describes_no_model_or_another_is_an_error(path, content, change, expected):
    assert re.search(expected, error_of(path, content | {"config": content["config"] | change}))


@pytest.mark.parametrize(
    "gone", ["pred_action.bias", "transformer_encoder.layers.0.linear1.weight"]
)
def test_tensors_too_few_too_many_or_diverged_are_named(path, content, gone):
    weights = content["model"]
    less = {name: tensor for name, tensor in weights.items() if name != gone}
    assert gone in error_of(path, content | {"model": less})
    more = weights | {"causal_mask": torch.zeros(12, 12)}
    message = error_of(path, content | {"model": more})
    assert "expected causal_mask of shape none, got (12, 12)" in message
    bad = weights | {gone: weights[gone] / 0}
    message = error_of(path, content | {"model": bad})
    assert f"{gone} is not finite: the training diverged" in message


@pytest.mark.parametrize(
    "change",
    [
        {"model": [1, 2]},
        {"config": "config"},
        {"step": "last"},
        {"model": {"pos_embedding": 3}},
        {"model": {"transformer_encoder.layers.0.linear1.weight": torch.zeros(())}},
    ],
    ids=["model-list", "config-str", "step-str", "number-as-tensor", "no-axes"],
)
def test_parts_of_another_type_are_an_error(path, content, change):
    error_of(path, content | change)


# Checkpoints of other code


def test_what_existing_checkpoints_do_not_say_is_taken_as_usual(path, content):
    """No test goals, no dropout, sizes of state and action left out."""
    for name in ("tf_dropout", "dim_states", "num_actions", "tf_n_inner"):
        del content["config"][name]
    del content["goals"]
    found = loaded(path, content)
    assert (found.goals, found.model.config.tf_dropout) == ({}, 0.0)


def test_a_foreign_run_loads_as_it_is(tmp_path, tiny_model, tiny_config):
    run, _ = make_foreign_run(
        tmp_path, tiny_model.state_dict(), 2, grid_size=5, horizon=5, n_steps=5, step=9000
    )
    touch(run / "events.out.tfevents.1")
    for where in (run, run.parent, run / "ckpt-9000.pt"):
        assert find_checkpoint(where).path == run / "ckpt-9000.pt"
    found = load_checkpoint(run / "ckpt-9000.pt")
    assert found.step == 9000
    assert found.model.config == tiny_config
    assert found.config["device"] == torch.device("cuda:0")
    assert found.config["tf_n_inner"] != tiny_config.tf_n_inner  # that of the tensors counts
    assert same_logits(found.model, tiny_model)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models_are_those_of_the_model(path, content, wrapper):
    wrapped = {wrapper + name: tensor for name, tensor in content["model"].items()}
    found = loaded(path, content | {"model": wrapped}).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in content["model"].items())


def test_a_prefix_of_some_names_is_left_in_place(path, content):
    content["model"]["module.pred_action.bias"] = content["model"].pop("pred_action.bias")
    expected = "expected pred_action.bias of shape (5,), got none (and 1 more)"
    assert expected in error_of(path, content)


def test_held_out_goals_are_those_that_such_code_names():
    """The eight goals that a published run with split seed 0 was evaluated on."""
    goals = split_of({"grid_size": 9, "env_split_seed": 0, "train_env_ratio": 0.9})
    expected = [[4, 2], [5, 6], [6, 8], [7, 2], [3, 6], [0, 5], [5, 8], [5, 4]]
    assert goals["test"] == expected
    assert sorted(goals["train"] + expected) == [[r, c] for r in range(9) for c in range(9)]


@given(st.integers(2, 12), st.integers(-5, 2**40), st.floats(0, 1))
def test_the_split_is_that_of_the_global_generator_and_leaves_it_alone(grid_size, seed, ratio):
    random.seed(1)
    before = random.getstate()
    config = {"grid_size": grid_size, "env_split_seed": seed, "train_env_ratio": ratio}
    goals = split_of(config)
    assert random.getstate() == before
    cells = held_out(seed, ratio, grid_size**2)
    assert goals["test"] == [list(divmod(cell, grid_size)) for cell in cells]
    assert len(goals["train"]) + len(cells) == grid_size**2


def test_goals_that_a_checkpoint_names_are_not_derived(path, content):
    assert loaded(path, content, env_split_seed=0, train_env_ratio=0.9).goals == content["goals"]


@pytest.mark.parametrize(
    "change", [{"env_split_seed": None}, {"train_env_ratio": None}, {"env": "darkroompermuted"}]
)
def test_a_split_that_the_config_does_not_tell_is_not_guessed(change):
    config = {"env": "darkroom", "grid_size": 9, "env_split_seed": 0, "train_env_ratio": 0.9}
    assert split_of(config)
    assert split_of(config | change) == {}


def test_the_dark_room_is_known_by_any_spelling():
    assert is_dark_room({})
    for env in ("darkroom", "DarkRoom", "dark_room", "Dark Room"):
        assert is_dark_room({"env": env})
    for other in ("darkroompermuted", "darkkeytodoor", "dark_room_hard", None, 3):
        assert not is_dark_room({"env": other})


# Devices


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:x"])
def test_a_device_is_picked_by_its_name_and_one_that_is_not_there_is_an_error(name):
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UserError, match=f"expected a --device of this machine.*{name!r}"):
        pick_device(name)
