"""Training as a command: what it writes, and that an interruption changes nothing of it."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ad import learning_curve, training
from ad.acting import rollout_goals
from ad.checkpoints import checkpoint_step, checkpoints_in, load_checkpoint, read_file
from ad.darkroom import optimal_return, split_goals
from ad.training import Trainer, lr_factor, make_optimizer
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from dataset import Histories
from historylens.common.errors import run_command
from model import ADTransformer
from train import main

N_UPDATES, EVAL_EVERY, EMA_DECAY = 7, 3, 0.5
TINY = {
    "n_transit": 12, "horizon": 5, "grid_size": 3, "n_test_goals": 2, "n_validation_goals": 2,
    "n_streams": 2, "n_source_steps": 60, "tf_n_layer": 1, "tf_n_head": 2, "tf_n_embd": 16,
    "tf_n_inner": 16, "batch_size": 4, "n_updates": N_UPDATES, "eval_every": EVAL_EVERY,
    "eval_episodes": 4, "eval_rollouts": 2, "final_rollouts": 3, "n_warmup": 2,
    "ema_decay": EMA_DECAY, "device": "cpu",
}  # fmt: skip
SPLIT = {name: goals.tolist() for name, goals in split_goals(0, 3, 2, 2).items()}


def flags(folder, *more, **changed):
    """Flags of a tiny run that lives in `folder`."""
    argv = ["--checkpoints", str(folder / "checkpoints"), "--figs", str(folder / "figs")]
    for name, value in (TINY | changed).items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return [*argv, *more]


def run_of(folder, seed=0):
    return folder / "checkpoints" / f"AD-darkroom-seed{seed}"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers_of(run):
    return json.loads((run / "training.json").read_text())


def fails(argv, capsys):
    """The one line, after progress bars, that a user's mistake ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(argv))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    (line,) = [line for line in err.split("\r")[-1].splitlines() if line]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run without an interruption, and what was seen on the way.

    `weights` of the model after every update; `history_goals` of every call that makes learning
    histories; `evaluated`: (update, goals) of every evaluation.
    """
    folder = tmp_path_factory.mktemp("finished")
    seen = SimpleNamespace(folder=folder, run=run_of(folder))
    seen.weights, seen.history_goals, seen.evaluated = [], [], []
    update, evaluate, histories = Trainer.update, Trainer.evaluate, training.learning_histories

    def watched_update(self):
        update(self)
        seen.weights.append({k: v.clone() for k, v in self.model.state_dict().items()})

    def watched_evaluate(self, goals, *args):
        seen.evaluated.append((self.step, goals.tolist()))
        return evaluate(self, goals, *args)

    def watched_histories(goals, *args):
        seen.history_goals.append(goals.tolist())
        return histories(goals, *args)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(Trainer, "update", watched_update)
        patch.setattr(Trainer, "evaluate", watched_evaluate)
        patch.setattr(training, "learning_histories", watched_histories)
        main(flags(seen.folder))
    seen.stdout = out.getvalue()
    return seen


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(learning_curve, "draw_learning_curve", lambda *_: None)


def assert_same_run(run, other):
    """Equal weights, histories and numbers; only the time that it took may differ."""
    assert [p.name for p in checkpoints_in(run)] == [p.name for p in checkpoints_in(other)]
    for one, two in zip(checkpoints_in(run), checkpoints_in(other), strict=True):
        one, two = read_file(one), read_file(two)
        weights = two.pop("model")
        assert all(torch.equal(value, weights[k]) for k, value in one.pop("model").items())
        assert one == two
    name = "histories-test.npz"
    assert (run / name).read_bytes() == (other / name).read_bytes()
    assert numbers_of(run) | {"seconds": 0} == numbers_of(other) | {"seconds": 0}


# What a run leaves


def test_a_finished_run_holds_checkpoints_histories_and_numbers_and_nothing_else(finished):
    kept = {path.name for path in checkpoints_in(finished.run)}
    assert kept
    files = {path.name for path in finished.run.iterdir()}
    assert files == kept | {"histories-test.npz", "training.json"}
    (picture,) = (finished.folder / "figs").rglob("*.*")
    assert picture == finished.folder / "figs" / "training" / "AD-darkroom-seed0.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_holds_what_its_format_says_and_no_optimizer(finished):
    content = read_file(checkpoints_in(finished.run)[-1])
    assert set(content) == {"step", "config", "model", "optimizer", "lr_sched", "goals"}
    assert content["optimizer"] is content["lr_sched"] is None
    expected = TINY | {"env": "darkroom", "dim_states": 2, "num_actions": 5}
    assert content["config"].items() >= expected.items()


def test_checkpoints_are_those_that_validate_best_so_far(finished):
    numbers = numbers_of(finished.run)
    assert [entry["step"] for entry in numbers["log"]] == [3, 6, 7]
    best, expected = -1.0, []
    for entry in numbers["log"]:
        if entry["validation_relative"] > best:
            best = entry["validation_relative"]
            expected.append(entry["step"])
    assert [checkpoint_step(path) for path in checkpoints_in(finished.run)] == expected
    assert numbers["chosen_step"] == expected[-1]


def test_the_averaged_weights_are_kept_not_the_latest(finished):
    for path in checkpoints_in(finished.run):
        kept, step = read_file(path)["model"], checkpoint_step(path)
        for name in kept:
            average = finished.weights[0][name]
            for weights in finished.weights[1:step]:
                average = EMA_DECAY * average + (1 - EMA_DECAY) * weights[name]
            torch.testing.assert_close(kept[name], average, rtol=1e-5, atol=1e-6)
        assert not torch.equal(kept["pos_embedding"], finished.weights[step - 1]["pos_embedding"])


def test_final_numbers_are_printed(finished):
    test, lines = numbers_of(finished.run)["test"], finished.stdout.splitlines()
    (mean,) = [line.split() for line in lines if "mean  " in line]
    assert mean[1:3] == [f"{test['possible']:.2f}", f"{test['return']:.2f}"]
    for (row, col), reached in zip(test["goals"], test["return_by_goal"], strict=True):
        (line,) = [line for line in lines if f"({row}, {col})" in line]
        assert f"{reached:.2f}" in line
    assert str(checkpoints_in(finished.run)[-1]) in finished.stdout
    assert str(finished.run / "training.json") in finished.stdout


def test_test_numbers_are_those_of_the_kept_weights(finished):
    model = load_checkpoint(checkpoints_in(finished.run)[-1]).model
    goals, test = np.array(SPLIT["test"]), numbers_of(finished.run)["test"]
    returns = rollout_goals(model, np.repeat(goals, 3, axis=0), 4, seed=0, horizon=5)
    late = returns.reshape(2, 3, 4)[:, :, 2:].mean(axis=(1, 2))
    assert test["return_by_goal"] == late.tolist()
    assert test["possible_by_goal"] == optimal_return(goals, 3, 5).tolist()
    assert test["relative"] == pytest.approx(late.sum() / sum(test["possible_by_goal"]))


def test_a_training_that_diverges_still_ends_with_the_checkpoint_from_before(tmp_path, capsys):
    main(flags(tmp_path, eval_every=1, lr=1e30))
    numbers = numbers_of(run_of(tmp_path))
    assert np.isnan(numbers["log"][-1]["loss"])
    assert numbers["chosen_step"] == 1
    assert "loss nan" in capsys.readouterr().out


# No test goal reaches training or the choice of a checkpoint


def test_training_histories_are_of_training_goals_alone(finished):
    assert finished.history_goals == [SPLIT["train"], SPLIT["test"]]
    assert not any(goal in SPLIT["train"] for goal in SPLIT["validation"] + SPLIT["test"])
    assert read_file(checkpoints_in(finished.run)[-1])["goals"] == SPLIT
    kept = Histories.load(finished.run / "histories-test.npz")
    assert np.unique(kept.goals, axis=0).tolist() == SPLIT["test"]


def test_no_test_goal_is_acted_on_before_the_checkpoint_is_chosen(finished):
    choosing, final = finished.evaluated[:6], finished.evaluated[6:]
    assert [step for step, _ in choosing] == [3, 3, 6, 6, 7, 7]
    assert all(goal in SPLIT["train"] for _, goals in choosing[::2] for goal in goals)
    assert all(goals == SPLIT["validation"] for _, goals in choosing[1::2])
    assert [goals for _, goals in final] == [SPLIT["test"]] * 2


# Interruption


def killed():
    raise SystemError("stands for what leaves no time to save")


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def run_interrupted(argv, name, call, action=press_ctrl_c):
    """Run, and act just before the given call, counted from 1, of a function of training."""
    original, calls = getattr(training, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            action()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, name, wrapped)
        with pytest.raises((KeyboardInterrupt, SystemError)):
            main(argv)


INTERRUPTIONS = {
    "inside the second update": ("packed_queries", 2),
    "inside the first update after an evaluation": ("packed_queries", 4),
    "as an evaluation begins": ("rollout_goals", 1),
    "inside an evaluation": ("rollout_goals", 4),
    "inside the last evaluation": ("rollout_goals", 6),
    "inside the evaluation on test goals": ("rollout_goals", 8),
    "killed after an evaluation": ("packed_queries", 5, killed),
    "killed inside an evaluation": ("rollout_goals", 4, killed),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_one_that_was_not(finished, tmp_path, no_picture, name):
    run = run_of(tmp_path)
    run_interrupted(flags(tmp_path), *INTERRUPTIONS[name])
    assert (run / "resume.pt").exists()
    assert not (run / "training.json").exists()
    torch.manual_seed(12345)
    main(flags(tmp_path, "--resume"))
    assert not (run / "resume.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_run(run, finished.run)


def test_a_run_may_be_interrupted_again_and_again(finished, tmp_path, no_picture, capsys):
    for step in range(1, N_UPDATES):
        argv = flags(tmp_path, *(["--resume"] if step > 1 else []))
        run_interrupted(argv, "packed_queries", 1)
        assert f"Stopped at update {step}." in capsys.readouterr().out
    main(flags(tmp_path, "--resume"))
    assert_same_run(run_of(tmp_path), finished.run)


def test_a_run_on_thinned_histories_ends_alike_with_and_without_an_interruption(
    tmp_path, no_picture, finished
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(flags(whole, history_dropout=0.5))
    run_interrupted(flags(parts, history_dropout=0.5), "packed_queries", 5)
    main(flags(parts, "--resume", history_dropout=0.5))
    assert_same_run(run_of(whole), run_of(parts))
    losses = [numbers_of(run)["log"][-1]["loss"] for run in (run_of(whole), finished.run)]
    assert losses[0] != losses[1]


def test_a_run_begun_before_there_was_a_setting_goes_on_with_its_default(
    finished, tmp_path, no_picture, capsys
):
    run_interrupted(flags(tmp_path), "packed_queries", 2)
    resume = run_of(tmp_path) / "resume.pt"
    state = read_file(resume)
    del state["config"]["history_dropout"]
    torch.save(state, resume)
    line = fails(flags(tmp_path, "--resume", history_dropout=0.5), capsys)
    assert "expected --history-dropout 0.0, got 0.5" in line
    main(flags(tmp_path, "--resume"))
    assert_same_run(run_of(tmp_path), finished.run)


# Nothing is overwritten


def test_a_run_is_never_overwritten_nor_resumed_once_it_has_ended(finished, capsys):
    before = files_of(finished.folder)
    line = fails(flags(finished.folder), capsys)
    assert "holds a run already" in line
    assert "--run" in line
    assert "--resume" not in line
    assert "nothing to resume" in fails(flags(finished.folder, "--resume"), capsys)
    assert files_of(finished.folder) == before


def test_an_interrupted_run_is_not_overwritten_either(tmp_path, capsys):
    run_interrupted(flags(tmp_path), "packed_queries", 2)
    before = files_of(tmp_path)
    assert "--resume" in fails(flags(tmp_path), capsys)
    line = fails(flags(tmp_path, "--resume", lr=0.5), capsys)
    assert "expected --lr 0.002, got 0.5" in line
    assert files_of(tmp_path) == before
    resume = run_of(tmp_path) / "resume.pt"
    resume.write_bytes(resume.read_bytes()[:5000])
    assert f"{resume} (5,000 bytes) cannot be read" in fails(flags(tmp_path, "--resume"), capsys)


def test_another_seed_is_another_run_with_other_weights(finished, tmp_path, no_picture):
    main(flags(tmp_path, seed=1))
    runs = finished.run, run_of(tmp_path, seed=1)
    one, other = (read_file(checkpoints_in(run)[-1]) for run in runs)
    assert one["goals"] == other["goals"]
    assert not torch.allclose(one["model"]["pos_embedding"], other["model"]["pos_embedding"])


# Flags


def test_help_mentions_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    names = {f.name for c in (EnvConfig, SourceConfig, ModelConfig, TrainConfig)
             for f in dataclasses.fields(c)}  # fmt: skip
    fixed = {"env", "dim_states", "num_actions"}  # Dark Room's own
    for name in (names - fixed) | {"run", "resume", "checkpoints", "figs"}:
        assert f"--{name.replace('_', '-')} " in text
    assert not any(f"--{name.replace('_', '-')} " in text for name in fixed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_updates": 0}, "--n-updates of at least 1, got 0"),
        ({"eval_every": 0}, "--eval-every of at least 1, got 0"),
        ({"tf_n_head": 3}, "multiple of --tf-n-head, got 16 and 3"),
        ({"n_test_goals": 8}, "9 cells"),
        ({"n_source_steps": 10}, "expected more than 11 steps"),
        ({"n_source_steps": 3}, "histories too short"),
        ({"device": "cuda:99"}, "'cuda:99', which is not there"),
        ({"seed": -1}, "--seed of at least 0"),
        ({"ema_decay": 1.5}, "--ema-decay"),
        ({"history_dropout": -0.1}, "--history-dropout between 0 and 1, got -0.1"),
        ({"history_dropout": 0.5, "n_transit": 1}, "--n-transit of at least 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_one_line_and_leave_nothing(
    tmp_path, capsys, changed, message
):
    assert message in fails(flags(tmp_path, **changed), capsys)
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("name", ["checkpoints", "figs"])
def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(
    tmp_path, monkeypatch, capsys, name
):
    (tmp_path / name).write_text("a file")
    monkeypatch.setattr(training, "learning_histories", None)
    line = fails(flags(tmp_path), capsys)
    assert "cannot write" in line
    assert f"--{name}" in line


def test_the_real_command_ends_with_one_line_and_code_2(tmp_path):
    command = Path(main.__code__.co_filename)
    done = subprocess.run(
        [sys.executable, command, "--resume", "--checkpoints", tmp_path / "none"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nothing to resume")
    assert done.stderr.count("\n") == 1


# The optimiser


def test_the_learning_rate_warms_up_then_falls_to_a_twentieth():
    factors = [lr_factor(step, 10, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] > 0.97
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert factors[100] == pytest.approx(0.05)


def test_weight_decay_leaves_biases_and_norms_alone():
    model = ADTransformer(ModelConfig(tf_n_layer=1, tf_n_embd=8, tf_n_head=1))
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_vector = "bias" in name or "norm" in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.1)
