"""Checkpoints are found, written whole, read without running anything, and checked."""

import os
import random
import re

import numpy as np
import pytest
import torch
from conftest import random_window, sharp_model
from foreign import held_out
from hostile import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from ad import checkpoints
from ad.checkpoints import checkpoints_in, find_checkpoint, load_checkpoint, save_checkpoint
from config import NEEDED, READ_FROM_CHECKPOINTS
from historylens.common.errors import UserError


def touch(path, age=0):
    """An empty file, written `age` seconds before now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (1_700_000_000 - age,) * 2)


@pytest.fixture
def content(run_file):
    return torch.load(run_file, weights_only=True)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "ckpt-30.pt"


def loaded(path, content, save=save_checkpoint, **config):
    save(path, content | {"config": content["config"] | config})
    return load_checkpoint(path)


def error_of(path, content) -> str:
    torch.save(content, path)
    return refusal(path)


def same_logits(one, other):
    context, queries = random_window(one.config, 3, 11)
    with torch.no_grad():
        return torch.equal(one(*context, queries[:, -1]), other(*context, queries[:, -1]))


def test_steps_are_read_from_names_and_ordered_as_numbers_and_none_says_to_train(tmp_path):
    for where in (".", "nowhere", "empty"):
        touch(tmp_path / "empty" / "resume.pt")
        with pytest.raises(UserError, match=r"No checkpoint found.*`python train\.py`"):
            find_checkpoint(tmp_path / where)
    for name in ("ckpt-10000.pt", "ckpt-9000.pt", "ckpt-0500.pt", "ckpt-100000.pt"):
        touch(tmp_path / name, age=len(name))
    for name in ("ckpt-last.pt", ".ckpt-999999.pt.part", "resume.pt", "ckpt-.pt", "ckpt--1.pt"):
        touch(tmp_path / name)
    found = [path.stem.removeprefix("ckpt-") for path in checkpoints_in(tmp_path)]
    assert found == ["0500", "9000", "10000", "100000"]


@pytest.mark.parametrize(("ages", "where", "expected", "reason"), [
    ({"ckpt-10000.pt": 50, "ckpt-9000.pt": 0}, ".", "ckpt-10000.pt",
     "highest step of 2 in the run asked for"),
    ({"a/ckpt-10000.pt": 20, "b/ckpt-2000.pt": 10, "b/ckpt-300.pt": 0, "c/ckpt-90000.pt": 5},
     ".", "b/ckpt-2000.pt", "last written of 3 runs, highest step of 2"),
    ({"a/ckpt-1.pt": 0, "empty/x": 0, "notes.txt": 0}, ".", "a/ckpt-1.pt",
     "the only run, highest step of 1"),
    ({"ckpt-9.pt": 0, "weights.bin": 0}, "weights.bin", "weights.bin", "the file asked for"),
])  # fmt: skip
def test_the_latest_checkpoint_is_found_and_why_is_said(tmp_path, ages, where, expected, reason):
    for name, age in ages.items():
        touch(tmp_path / name, age)
    assert find_checkpoint(str(tmp_path / where)) == (tmp_path / expected, reason)


def test_a_checkpoint_survives_trips(path, content, tiny_config):
    found = loaded(path, content, env_split_seed=0, train_env_ratio=0.9)
    assert (found.path, found.step) == (path, 5)
    assert found.goals == content["goals"]  # its own, not those that its config implies
    assert found.config == content["config"] | {"env_split_seed": 0, "train_env_ratio": 0.9}
    assert found.model.config == tiny_config
    assert not found.model.training
    assert same_logits(found.model, sharp_model(tiny_config))


ODD = [True, [5], {"a": 1}, torch.tensor(5), float("nan"), float("inf"), 2**64, -(10**400), b"9"]


class Intruder(str):
    """Pickled code: reading it without care makes the folder of this name."""

    def __reduce__(self):
        return (os.mkdir, (str(self),))


def test_code_in_a_file_is_refused_and_named_and_not_executed(tmp_path, path, content):
    assert "not loaded because" in error_of(path, content | {"goals": Intruder(tmp_path / "ran")})
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the file was indeed dangerous


def test_what_is_no_checkpoint_or_truncated_is_an_error_that_names_it(path, content):
    assert "No checkpoint found" in refusal(path)
    path.write_text("not a checkpoint")
    assert "cannot be read as a checkpoint" in refusal(path)
    assert "got one with pos_embedding" in error_of(path, dict(content["model"]))
    assert "got Tensor" in error_of(path, torch.zeros(3))
    expected = "is not a checkpoint of an AD model: expected a dict with step, config, model, got "
    for missing in ("step", "config", "model"):
        message = error_of(path, {k: v for k, v in content.items() if k != missing})
        assert f"{expected}one with" in message
    save_checkpoint(path, content)
    whole = path.read_bytes()
    for size in (0, len(whole) // 100, len(whole) // 2, len(whole) - 99):
        path.write_bytes(whole[:size])
        text = rf"\({size:,} bytes\) cannot be read as a checkpoint.*truncat"
        assert re.search(text, refusal(path))


@pytest.mark.parametrize(("change", "expected"), [
    ({"n_transit": 13}, "pos_embedding of shape (1, 13, 16), got (1, 12, 16)"),
    ({"grid_size": 9}, "embed_query_state.weight of shape (81, 16), got (25, 16)"),
    ({"num_actions": 4}, "embed_context.weight of shape (16, 9), got (16, 10)"),
    ({"tf_n_layer": 3}, "layers.2.self_attn.in_proj_weight of shape (48, 16), got none"),
    ({"tf_n_layer": 1}, "weight of shape none, got (48, 16) (and 11 more)"),
    ({"tf_n_head": 3}, "--tf-n-embd to be a multiple of --tf-n-head, got 16 and 3"),
    *(({name: value}, f"{name} in its config to be a")
      for name, (kind, least, most) in READ_FROM_CHECKPOINTS.items()
      for value in ([7, "x" * 101] if kind is str else ["many", least - 1, most + 1])),
    *(({name: value}, f"{name} in its config to be a")
      for name in ("tf_n_layer", "tf_dropout", "env") for value in ODD),  # of each kind one
    *(({name: None}, f"expected {name} in its config, got none") for name in NEEDED),
    ([1, 2], "expected its config and model to be dicts"),
])  # fmt: skip
def test_a_config_that_describes_no_model_or_another_is_an_error(path, content, change, expected):
    config = content["config"] | change if isinstance(change, dict) else change
    assert expected in error_of(path, content | {"config": config})


def test_tensors_too_few_too_many_renamed_diverged_or_none_are_named(path, content):
    weights, name = content["model"], "transformer_encoder.layers.0.linear1.weight"
    less = {other: tensor for other, tensor in weights.items() if other != name}
    diverged = f"{name} is not finite or beyond 3e+38: the training diverged"
    for changed, expected in (
        (less, f"expected {name} of shape "),
        (weights | {"mask": torch.zeros(2, 3)}, "expected mask of shape none, got (2, 3)"),
        (less | {f"module.{name}": weights[name]}, "got none (and 1 more)"),  # not a wrapper's
        (weights | {name: weights[name] / 0}, diverged),
        (weights | {name: torch.zeros(())}, "do not fit its config"),
        (weights | {name: 3}, "expected its model to be a dict of tensors"),
        ([1, 2], "expected its config and model to be dicts"),
    ):
        assert expected in error_of(path, content | {"model": changed})
    expected = "expected its step to be a whole number in 0..9223372036854775808, got 'last'"
    assert expected in error_of(path, content | {"step": "last"})


def test_numbers_of_numpy_names_of_wrapped_models_and_what_other_code_leaves_out(path, content):
    for wrapper in ("module.", "_orig_mod.module."):
        wrapped = {wrapper + name: tensor for name, tensor in content["model"].items()}
        wrapped["n_averaged"] = torch.tensor(3)  # of an AveragedModel
        found = loaded(path, content | {"model": wrapped}).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in content["model"].items())
    numbers = {"tf_n_head": np.int64(2), "lr": np.float32(0.5), "flag": np.bool_(True)}
    other = content | {"step": np.int64(7), "best": np.float64(3)}
    found = loaded(path, other, lambda path, content: torch.save(content, path), **numbers)
    assert type(found.step) is int
    for name, value in {"tf_n_head": 2, "lr": 0.5, "flag": True}.items():
        assert (found.config[name], type(found.config[name])) == (value, type(value))
    for name in ("tf_dropout", "dim_states", "num_actions", "tf_n_inner"):
        del content["config"][name]
    del content["goals"]
    found = loaded(path, content)
    assert (found.goals, found.model.config.tf_dropout) == ({}, 0.0)


def test_held_out_goals_are_those_that_such_code_names_and_never_guessed():
    config = {"env": "darkroom", "grid_size": 9, "env_split_seed": 0, "train_env_ratio": 0.9}
    expected = [[4, 2], [5, 6], [6, 8], [7, 2], [3, 6], [0, 5], [5, 8], [5, 4]]  # as published
    goals = checkpoints.split_of(config)
    assert goals["test"] == expected
    assert sorted(goals["train"] + expected) == [[r, c] for r in range(9) for c in range(9)]
    for name, value in (("env_split_seed", None), ("train_env_ratio", None), ("env", "other")):
        assert checkpoints.split_of(config | {name: value}) == {}
    for env, task in (("DarkRoom", "darkroom"), ("Dark Room", "darkroom"), ("dark_room_hard", None),
                      ("darkkeytodoor", None), (3, None)):  # fmt: skip
        assert checkpoints.task_of({"env": env}) == task
    assert checkpoints.task_of({}) == checkpoints.task_of({"env": None}) == "darkroom"


@settings(max_examples=10)
@given(st.integers(2, 12), st.integers(-5, 2**40), st.floats(0, 1))
def test_the_split_is_that_of_the_global_generator_and_leaves_it_alone(grid_size, seed, ratio):
    config = {"grid_size": grid_size, "env_split_seed": seed, "train_env_ratio": ratio}
    before, goals = random.getstate(), checkpoints.split_of(config)
    assert random.getstate() == before
    cells = held_out(seed, ratio, grid_size**2)
    assert goals["test"] == [list(divmod(cell, grid_size)) for cell in cells]
    assert len(goals["train"]) + len(cells) == grid_size**2
