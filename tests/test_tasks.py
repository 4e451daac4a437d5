"""Every task goes all the way: trained, looked at, compared; all of it from its checkpoint."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_train import flags

from ad.darkroom import TASKS
from compare_compression import main as compare
from dataset import Histories
from train import main as train
from visualize_attention import main as visualize

LONGER = {"horizon": 6, "n_source_steps": 120, "n_train_goals": 5, "history_dropout": 0.5}


@pytest.mark.usefixtures("few_effects", "undrawn")
@pytest.mark.parametrize("env", TASKS)
def test_the_task_of_a_checkpoint_is_that_of_all_that_follows(env, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task, run = TASKS[env], tmp_path / "checkpoints" / f"AD-{env}-seed0"
    train(flags(tmp_path, env=env, **LONGER))
    numbers = json.loads((run / "training.json").read_text())
    goals = numbers["test"]["goals"]
    assert numbers["config"]["env"] == env
    assert {len(goal) for goal in goals} == {2 * len(task.hidden)}
    assert f" {numbers['test']['possible']:.2f} " in capsys.readouterr().out
    histories = Histories.load(run / "histories-test.npz")
    assert np.unique(histories.goals, axis=0).tolist() == goals
    most = len(task.hidden) if task.is_once else histories.horizon
    assert histories.episode_returns().max() <= most

    visualize(["--num-samples", "3", "--num-figures", "1", "--layers", "0"])
    assert f"updates in {task.title}, 3 x 3" in " ".join(capsys.readouterr().out.split())
    first = next(csv.DictReader(Path("figs/attention/metrics.csv").read_text().splitlines()))
    told = json.loads(Path("figs/attention/metrics.json").read_text())
    assert list(first)[1 : 1 + len(task.columns)] == task.columns
    goal = [int(first[name]) for name in task.columns]
    assert goal in goals
    assert np.ravel(told["drawn"]["maps"]["0"]["goals"]).tolist() == goal

    compare(["--strategies=recent", "--budgets=3", "--seeds=1", "--episodes=2", "--confirm=0"])
    told = json.loads(Path("figs/compression/results.json").read_text())
    names = [task.name(goal) for goal in goals]
    assert told["fingerprint"]["goals"] == names
    assert told["summary"]["task"].startswith(f"AD in {task.title}, ")
    assert f"{task.title}, " in capsys.readouterr().out
