"""Training as a command: what it writes, and that an interruption changes nothing of it."""

import contextlib
import io
import itertools
import json
import re
import signal
from operator import attrgetter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import files_of, refused

from ad import evaluation, training
from ad.checkpoints import checkpoints_in, load_checkpoint, read_file
from ad.darkroom import optimal_return, split_goals
from ad.evaluation import rollout_goals
from ad.training import AveragedModel, Settings, Trainer, lr_factor, make_optimizer
from config import DEFAULTS_OF, ModelConfig, TrainConfig
from dataset import Histories
from historylens.common.settings import flag_of, to_dict
from model import ADTransformer
from train import main

TINY = {
    "n_transit": 12, "horizon": 5, "grid_size": 3, "n_test_goals": 2, "n_validation_goals": 2,
    "n_streams": 2, "n_source_steps": 60, "tf_n_layer": 1, "tf_n_head": 2, "tf_n_embd": 16,
    "tf_n_inner": 16, "batch_size": 4, "n_updates": 7, "eval_every": 3, "eval_episodes": 4,
    "eval_rollouts": 2, "final_rollouts": 3, "n_warmup": 2, "ema_decay": 0.5, "device": "cpu",
}  # fmt: skip
OWN = {"env": "darkroom", "dim_states": 2, "num_actions": 5}
SPLIT = {name: goals.tolist() for name, goals in split_goals(0, 3, 2, 2).items()}


def flags(folder, *more, **changed):
    argv = ["--checkpoints", str(folder / "checkpoints"), "--figs", str(folder / "figs")]
    argv += [f"{flag_of(name)}={value}" for name, value in (TINY | changed).items()]
    return [*argv, *more]


def run_of(folder, seed=0):
    return folder / "checkpoints" / f"AD-darkroom-seed{seed}"


def numbers_of(run):
    return json.loads((run / "training.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run without an interruption, and what was seen on the way."""
    folder = tmp_path_factory.mktemp("finished")
    seen = SimpleNamespace(folder=folder, run=run_of(folder))

    def watch(owner, name, see):
        called, found = getattr(owner, name), []
        patch.setattr(owner, name, lambda *args: (found.append(see(*args)), called(*args))[1])
        return found

    def copied(_, model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        seen.weights = watch(AveragedModel, "update_parameters", copied)  # after every update
        seen.evaluated = watch(Trainer, "evaluate", lambda self, goals, *_: (self.step, goals))
        seen.histories = watch(training, "learning_histories", lambda goals, *_: goals)
        main(flags(seen.folder))
    seen.stdout = out.getvalue()
    return seen


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(evaluation, "draw_learning_curve", lambda *_: None)


def assert_same_run(run, other):
    files = [{path.name: path.read_bytes() for path in one.iterdir()} for one in (run, other)]
    numbers = [json.loads(one.pop("training.json")) | {"seconds": 0} for one in files]
    assert files[0] == files[1]
    assert numbers[0] == numbers[1]


def test_a_finished_run_holds_checkpoints_histories_numbers_a_picture_and_nothing_else(finished):
    kept = checkpoints_in(finished.run)
    picture = "figs/training/AD-darkroom-seed0.png"
    names = {path.name for path in kept} | {"histories-test.npz", "training.json"}
    files, content = files_of(finished.folder), read_file(kept[-1])
    assert files.keys() == {f"checkpoints/AD-darkroom-seed0/{name}" for name in names} | {picture}
    assert files[picture].startswith(b"\x89PNG")
    assert set(content) == {"step", "config", "model", "optimizer", "lr_sched", "goals"}
    assert content["optimizer"] is content["lr_sched"] is None
    assert content["config"].items() >= (DEFAULTS_OF["darkroom"] | TINY | OWN).items()


def kept_steps(log):
    """The updates at which a score is no standard error below the best so far."""
    return [
        entry["step"]
        for i, entry in enumerate(log)
        if all(entry["score"] >= past["score"] - entry["score_error"] for past in log[:i])
    ]


def test_checkpoints_are_the_averaged_weights_that_validate_as_well_as_the_best_so_far(finished):
    numbers, kept = numbers_of(finished.run), checkpoints_in(finished.run)
    log, expected = numbers["log"], kept_steps(numbers["log"])
    assert [(entry["step"], entry["score"]) for entry in log] == [
        (step, log[i]["validation_relative"]) for i, step in enumerate([3, 6, 7])
    ]
    assert [path.name for path in kept] == [f"ckpt-{step}.pt" for step in expected]
    assert numbers["chosen_step"] == expected[-1]
    for path, step in zip(kept, expected, strict=True):
        model = read_file(path)["model"]
        for name, value in model.items():
            average = finished.weights[0][name]
            for weights in finished.weights[1:step]:
                average = 0.5 * average + 0.5 * weights[name]
            torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-6)
        assert not torch.equal(model["pos_embedding"], finished.weights[step - 1]["pos_embedding"])


def test_test_numbers_are_those_of_the_kept_weights_and_are_printed(finished):
    path, goals = checkpoints_in(finished.run)[-1], np.array(SPLIT["test"])
    test, lines = numbers_of(finished.run)["test"], finished.stdout.splitlines()
    rooms = np.repeat(goals, 3, axis=0)
    returns = rollout_goals(load_checkpoint(path).model, rooms, 4, seed=0, horizon=5)
    late = returns.reshape(2, 3, 4)[:, :, 2:].mean(axis=(1, 2))
    assert test["return_by_goal"] == late.tolist()
    assert test["possible_by_goal"] == optimal_return(goals, 3, 5).tolist()
    assert test["relative"] == pytest.approx(late.sum() / sum(test["possible_by_goal"]))
    (mean,) = [line.split() for line in lines if "mean  " in line]
    assert mean[1:3] == [f"{test['possible']:.2f}", f"{test['return']:.2f}"]
    for (row, col), reached in zip(test["goals"], late, strict=True):
        (line,) = [line for line in lines if f"({row}, {col})" in line]
        assert f"{reached:.2f}" in line
    assert all(str(file) in finished.stdout for file in (path, finished.run / "training.json"))


def test_a_training_that_diverges_still_ends_with_the_checkpoint_from_before(tmp_path, capsys):
    main(flags(tmp_path, eval_every=1, n_updates=3, lr=1e12))
    numbers = numbers_of(run_of(tmp_path))
    assert (numbers["chosen_step"], str(numbers["log"][-1]["loss"])) == (1, "nan")
    assert "loss nan" in capsys.readouterr().out


def test_no_test_goal_reaches_training_or_is_acted_on_before_the_checkpoint_is_chosen(finished):
    assert [goals.tolist() for goals in finished.histories] == [SPLIT["train"], SPLIT["test"]]
    assert not any(goal in SPLIT["train"] for goal in SPLIT["validation"] + SPLIT["test"])
    assert read_file(checkpoints_in(finished.run)[-1])["goals"] == SPLIT
    kept = Histories.load(finished.run / "histories-test.npz")
    assert np.unique(kept.goals, axis=0).tolist() == SPLIT["test"]
    evaluated = [goals.tolist() for _, goals in finished.evaluated]
    assert [step for step, _ in finished.evaluated[:6]] == [3, 3, 6, 6, 7, 7]
    assert all(goal in SPLIT["train"] for goals in evaluated[:6:2] for goal in goals)
    assert evaluated[1:6:2] == [SPLIT["validation"]] * 3
    assert all(len(goals) == len({*map(tuple, goals)}) for goals in evaluated)  # each once
    assert evaluated[6:] == [SPLIT["test"]] * 2


def run_interrupted(argv, name, call):
    """Run, and press Ctrl-C just before the given call, from 1, of a function of training."""
    original, calls = attrgetter(name)(training), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with mock.patch(f"ad.training.{name}", wrapped), pytest.raises(KeyboardInterrupt):
        main(argv)


LOSS = "PackedLoss.forward"  # runs once an update, in its middle
INTERRUPTIONS = {
    "as an evaluation begins": ("rollout_goals", 1),
    "inside the last evaluation": ("rollout_goals", 6),
    "inside the evaluation on test goals": ("rollout_goals", 8),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_one_that_was_not(finished, tmp_path, no_picture, name):
    run = run_of(tmp_path)
    run_interrupted(flags(tmp_path), *INTERRUPTIONS[name])
    assert read_file(run / "resume.pt")["step"] >= 3  # not that of the beginning
    assert not (run / "training.json").exists()
    torch.manual_seed(12345)
    main(flags(tmp_path, "--resume"))
    assert not (run / "resume.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_run(run, finished.run)


def test_updates_on_thinned_histories_can_be_interrupted(finished, tmp_path, no_picture, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(flags(whole, history_dropout=0.5))
    for step in (1, 2):
        resumed = ["--resume"] * (step > 1)
        run_interrupted(flags(parts, *resumed, history_dropout=0.5), LOSS, 1)
        assert f"Stopped at update {step}." in capsys.readouterr().out
    main(flags(parts, "--resume", history_dropout=0.5))
    assert_same_run(run_of(parts), run_of(whole))
    assert numbers_of(run_of(whole))["log"] != numbers_of(finished.run)["log"]


def test_a_run_is_never_overwritten_nor_resumed_once_it_has_ended(finished, capsys):
    before = files_of(finished.folder)
    line = refused(main, flags(finished.folder), capsys)
    assert line.endswith("holds a run already, which is not overwritten: name another with --run")
    assert "nothing to resume" in refused(main, flags(finished.folder, "--resume"), capsys)
    assert files_of(finished.folder) == before


def test_history_dropout_grows_and_counts_in_the_choice(tmp_path, no_picture, monkeypatch, capsys):
    drawn = mock.Mock(side_effect=training.draw_batch)
    monkeypatch.setattr(training, "draw_batch", drawn)
    main(flags(tmp_path, history_dropout=0.7))
    shares = [call.args[2] for call in drawn.call_args_list]
    assert shares == pytest.approx([0.1 * step for step in range(7)])
    numbers, out = numbers_of(run_of(tmp_path)), capsys.readouterr().out
    for entry in numbers["log"]:
        both, errors = (
            [entry[f"{name}_{what}"] for name in ("validation", "compressed")]
            for what in ("relative", "relative_error")
        )
        assert entry["score"] == pytest.approx(np.mean(both))
        assert entry["score_error"] == pytest.approx(np.hypot(*errors) / 2)
        assert f"on compressed history {entry['compressed_return']:.2f}" in out
    assert numbers["chosen_step"] == kept_steps(numbers["log"])[-1]


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path, capsys):
    run_interrupted(flags(tmp_path), LOSS, 2)
    resume = run_of(tmp_path) / "resume.pt"
    state = read_file(resume)
    del state["config"]["history_dropout"]  # as of a run older than the setting: its default
    torch.save(state, resume)
    before = files_of(tmp_path)
    assert "--resume" in refused(main, flags(tmp_path), capsys)
    for name, own in (("lr", 0.002), ("history_dropout", 0.0)):
        line = refused(main, flags(tmp_path, "--resume", **{name: 0.5}), capsys)
        assert f"expected {flag_of(name)} {own}, got 0.5" in line
    assert files_of(tmp_path) == before


def test_goals_out_of_reach_have_no_part_of_the_best(tmp_path, capsys):
    run = "x %{}" * 40  # as long as a name may be
    main(flags(tmp_path, run=run, horizon=2, grid_size=5, n_test_goals=6))
    table = re.findall(r"^ *(?:goal|\(|mean).*", capsys.readouterr().out, re.MULTILINE)
    assert len(set(map(len, table))) == 1
    rows = [line.split() for line in table if "(" in line]
    assert {(row[2] == "0", row[4] == "-") for row in rows} == {(False, False), (True, True)}
    assert (tmp_path / "figs" / "training" / f"{run}.png").exists()
    assert "NaN" not in (tmp_path / "checkpoints" / run / "training.json").read_text()


def test_another_seed_is_another_run_with_other_weights(finished, tmp_path, no_picture):
    main(flags(tmp_path, seed=1))
    one, other = (read_file(checkpoints_in(run)[-1]) for run in (finished.run, run_of(tmp_path, 1)))
    assert one["goals"] == other["goals"]
    assert not torch.allclose(*(each["model"]["pos_embedding"] for each in (one, other)))


def test_help_mentions_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    flags_shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    names = {*to_dict(*Settings()), "run", "resume", "checkpoints", "figs", "help"}
    assert flags_shown == {flag_of(name) for name in names - {"dim_states", "num_actions"}}


@pytest.mark.parametrize(("changed", "message"), [
    ({"n_updates": 0}, "--n-updates of at least 1, got 0"), ({"n_test_goals": 8}, "9 cells"),
    ({"eval_every": 0}, "--eval-every of at least 1"), ({"seed": -1}, "--seed of at least 0"),
    ({"n_source_steps": 10}, "--n-source-steps of more than 11 steps"),
    ({"n_source_steps": 3}, "histories too short"), ({"ema_decay": 1.5}, "--ema-decay"),
    ({"n_transit": 11, "n_source_steps": 10}, "--n-source-steps of more than 10 steps"),
    ({"device": "cuda:99"}, "'cuda:99', which is not there"),
    ({"history_dropout": -0.1}, "--history-dropout between 0 and 1, got -0.1"),
    ({"history_dropout": 0.5, "n_transit": 1}, "--n-transit of at least 2"),
    ({"horizon": 1, "n_test_goals": 1, "goal_seed": 2}, "no test goal can be reached"),
    *(({"run": name}, "expected --run to be the plain name of a folder, of at most 200 bytes, got")
      for name in ("", "..", "a/b", "a\nb", "ü" * 101)),
    ({"checkpoints": ""}, "expected --checkpoints and --figs not to be empty"),
    ({"checkpoints": "x" * 300}, "too long"),
    *(({name: 10**9}, "GiB of memory") for name in ("tf_n_layer", "batch_size", "final_rollouts")),
    ({"grid_size": 10**5}, "GiB of memory"), ({"lr": 1e38}, "--lr of at most"),
    ({"horizon": 1}, "no validation goal can be reached within --horizon 1"),
    ({"epsilon_start": 0, "epsilon_end": 1}, "--epsilon-end 1.0, got 0.0"),
    ({"epsilon_start": "-0"}, "between 0 and 1, got -0.0"),
    ({"device": "meta"}, "'meta', which is not there"),
], ids=str)  # fmt: skip
def test_settings_that_cannot_work_are_told_first(tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.setattr(training, "learning_histories", None)
    assert message in refused(main, flags(tmp_path, **changed), capsys)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["checkpoints", "figs"])
def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, monkeypatch, capsys, name):
    (tmp_path / name).write_text("a file")
    monkeypatch.setattr(training, "learning_histories", None)
    assert re.search(f"cannot write to .*--{name}", refused(main, flags(tmp_path), capsys))


def test_the_learning_rate_warms_up_then_falls_to_a_twentieth_and_matrices_alone_decay():
    factors = [lr_factor(step, 10, 100) for step in range(101)]
    assert factors[::100] == pytest.approx([0.1, 0.05])
    assert max(factors) == factors[9] > 0.97
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    model = ADTransformer(ModelConfig(tf_n_layer=1, tf_n_embd=8, tf_n_head=1))
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "bias" in name or "norm" in name else 0.1)
