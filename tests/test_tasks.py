"""Every task goes all the way: trained, looked at, compared; all of it from its checkpoint."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from ad.darkroom import TASKS
from compare_compression import main as compare
from dataset import Histories
from train import main as train
from visualize_attention import main as visualize

ROOT = Path(__file__).parents[1]
SHIPPED = "checkpoints/AD-darkroom-shipped", "checkpoints/other-tasks/key-to-door"
TINY = [
    "--grid-size=3", "--horizon=6", "--n-transit=12", "--n-test-goals=2", "--n-validation-goals=2",
    "--n-train-goals=5", "--n-streams=2", "--n-source-steps=120", "--tf-n-layer=1",
    "--tf-n-head=2", "--tf-n-embd=16", "--tf-n-inner=16", "--batch-size=4", "--n-updates=4",
    "--eval-every=2", "--eval-episodes=4", "--eval-rollouts=2", "--final-rollouts=2",
    "--history-dropout=0.5", "--device=cpu",
]  # fmt: skip


@pytest.mark.usefixtures("few_effects", "undrawn")
@pytest.mark.parametrize("env", TASKS)
def test_the_task_of_a_checkpoint_is_that_of_all_that_follows(env, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task, run = TASKS[env], tmp_path / "checkpoints" / f"AD-{env}-seed0"
    train(["--env", env, *TINY])
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


def test_histories_of_another_task_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for checkpoint, other in ((SHIPPED[0], SHIPPED[1]), (SHIPPED[1], SHIPPED[0])):
        argv = ["--checkpoint", checkpoint, "--histories", f"{other}/histories-test.npz"]
        said = refused(visualize, [*argv, "--out", str(tmp_path / "figs")], capsys)
        assert "does not fit the checkpoint: expected goals of" in said
    assert not (tmp_path / "figs").exists()
