"""How well a model learns, in numbers, and which checkpoint is kept by them."""

from types import SimpleNamespace

import numpy as np
import pytest

from ad.evaluation import score
from ad.training import Settings, Trainer
from config import EnvConfig


def test_a_checkpoint_is_kept_unless_it_is_a_standard_error_below_the_best_so_far():
    trainer = SimpleNamespace(
        step=9, losses=[1.0], goals={"train": np.zeros((3, 2)), "validation": np.zeros((1, 2))},
        settings=Settings(), slidings=["step"],
    )  # fmt: skip
    # Runs begun before there was a score have those of validation goals.
    cases = (0.4, 0, True), (0.5, 0, True), (0.6, 0, False), (0.6, 0.12, True), (0.6, 0.08, False)
    for before, error, kept in cases:
        trainer.log = [{"validation_relative": 0.1}, {"validation_relative": before}]
        numbers = {"relative": 0.5, "relative_error": error}
        trainer.evaluate = lambda *_, numbers=numbers: numbers
        assert Trainer.validate(trainer)["best"] == kept
    trainer.log, trainer.losses = [{"validation_relative": 0.1}], [np.nan]  # better, but diverged
    assert not Trainer.validate(trainer)["best"]
    trainer.log = []
    assert Trainer.validate(trainer)["best"]


def test_the_standard_error_of_a_return_is_that_over_rollouts_within_goals():
    goals, returns = np.array([[0, 0], [2, 2]]), np.zeros((2, 3, 4))
    returns[..., 2:] = [[[1, 1], [2, 2], [3, 3]], [[0, 2], [1, 1], [1, 1]]]  # (1, 2, 3), (1, 1, 1)
    env = EnvConfig(grid_size=3, horizon=5)
    numbers = score(env, goals, returns)
    assert numbers["relative"] == pytest.approx(1.5 / numbers["possible"])
    # Variances 1 and 0 of 3 rollouts each: that of the mean of both goals is (1 / 3 + 0) / 4.
    assert numbers["relative_error"] == pytest.approx(np.sqrt(1 / 12) / numbers["possible"])
    assert score(env, goals, returns[:, :1])["relative_error"] == 0
