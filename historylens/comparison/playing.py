"""Play arms of compressed history in an environment, paired, and keep what they earned.

    arms = plan(task, ["recent", "rewarded-recent"], [10, 20], plays)
    kept = KeptResults.open(out, fingerprint(task, plays, code_digest()))
    outcomes = play_arms(task, arms, plays, kept)

Every arm acts on the same goals with the same action noise: that of a room depends on the seed and
the room's number alone. After each arm the results are on disk, so that an interrupted comparison
goes on where it was.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from acting.reading import CompressedReader, Cost
from comparison.judgement import EMPTY, FULL, RECENT, Arm, Outcome
from comparison.kept_results import KeptResults
from comparison.task import Task
from compression import CONTROLS, STRATEGIES, Control, Merge, Strategy, get_strategy
from config import UserError
from rollout import MAX_ROOMS, act

CONFIRMING = 10**9  # between the seed of a comparison and that of the runs that confirm it


@dataclass(frozen=True)
class Plays:
    """How often each arm plays.

    Attributes:
        n_seeds: runs `R` of each goal.
        n_episodes: episodes `E` of a run.
        seed: of action noise and of what strategies draw.
    """

    n_seeds: int
    n_episodes: int
    seed: int

    def confirming(self, n_seeds: int) -> "Plays":
        """Runs of other action noise, for one arm that these runs point to."""
        return replace(self, n_seeds=n_seeds, seed=self.seed + CONFIRMING)


def plan(task: Task, strategies: Sequence[str], budgets: Sequence[int], plays: Plays) -> list[Arm]:
    """The arms to play: full, empty and the controls, then each strategy at each budget.

    With a single goal there is no other task, and that control is left out.

    Raises:
        UserError: an unknown strategy, one that this model cannot serve, or a budget that the model
            or the history cannot.
    """
    n_max, n_steps = task.view.n_max, plays.n_episodes * task.horizon
    for budget in budgets:
        if not 1 <= budget <= n_max:
            raise UserError(
                f"expected --budgets in 1..{n_max}, the transitions that this model can read, "
                f"got {budget}"
            )
        if n_steps <= budget:
            raise UserError(
                f"history shorter than the budget: {plays.n_episodes} episodes of {task.horizon} "
                f"steps never hold more than {n_steps - 1} transitions, and nothing is compressed "
                f"at --budgets {budget}: expected more --episodes or a smaller budget"
            )
    arms = [Arm(FULL), Arm(EMPTY)]
    arms += [Arm(name) for name in CONTROLS if name != "other-task" or task.n_goals > 1]
    for name in dict.fromkeys(strategies):
        if STRATEGIES.get(name) is None or STRATEGIES[name].keeps not in ("all", "none"):
            arms += [Arm(name, budget) for budget in sorted(set(budgets))]
    for arm in arms:
        CompressedReader(task.view, method_of(arm), arm.n_keep)
    return arms


def method_of(arm: Arm) -> Strategy | Merge | Control:
    """What an arm does to the history.

    Raises:
        UserError: there is nothing of that name.
    """
    if arm.name in CONTROLS:
        return CONTROLS[arm.name]
    try:
        return get_strategy(arm.name)
    except ValueError as error:
        raise UserError(str(error)) from None


def n_decisions(task: Task, plays: Plays) -> int:
    """Decisions that an arm makes."""
    return task.n_goals * plays.n_seeds * plays.n_episodes * task.horizon


def twin_of(arm: Arm, task: Task) -> Arm | None:
    """An arm that does the same: full history, where all that the model can read is kept.

    Recency is one, and so is what looks at attention: it chooses among what the model can read.
    """
    strategy = STRATEGIES.get(arm.name)
    looks = strategy is not None and strategy.looks_at.endswith("attention")
    is_same = arm.n_keep == task.view.n_max and (arm.name == RECENT or looks)
    return Arm(FULL) if is_same else None


def play_arms(
    task: Task, arms: Sequence[Arm], plays: Plays, kept: KeptResults, progress: bool = True
) -> list[Outcome]:
    """Play the arms that are not kept yet; keep each as soon as it is finished."""
    missing = [arm for arm in arms if arm.key not in kept.arms and twin_of(arm, task) is None]
    total = len(missing) * n_decisions(task, plays)
    with tqdm(
        total=total, unit=" decisions", unit_scale=True, disable=not (progress and missing)
    ) as bar:
        for i, arm in enumerate(missing):
            bar.set_description(f"{arm.key} ({i + 1} of {len(missing)} arms)")
            kept.add(arm, *play(task, arm, plays, bar))
    return [Outcome(arm, *_read(kept.arms[(twin_of(arm, task) or arm).key])) for arm in arms]


def play(task: Task, arm: Arm, plays: Plays, bar: tqdm | None = None) -> tuple[np.ndarray, Cost]:
    """Play one arm: rewards of each episode `(G, R, E)`, and what it cost.

    Goals take turns among the rooms, so that every block of rooms holds several.
    """
    n_rooms = task.n_goals * plays.n_seeds
    goals = np.arange(n_rooms) % task.n_goals
    generator = torch.Generator().manual_seed(_seed_of(arm, plays.seed))
    cost, parts = Cost(), []
    n_blocks = -(-n_rooms // MAX_ROOMS)
    bounds = np.linspace(0, n_rooms, n_blocks + 1).round().astype(int).tolist()
    for start, stop in pairwise(bounds):
        reader = CompressedReader(task.view, method_of(arm), arm.n_keep, generator)
        parts.append(
            act(
                task.make_room(goals[start:stop]),
                reader,
                plays.n_episodes * task.horizon,
                [np.random.default_rng((plays.seed, room)) for room in range(start, stop)],
                bar,
                goals[start:stop],
            )
        )
        cost += reader.cost
    rewards = np.concatenate(parts)  # (N, n_steps)
    shape = (plays.n_seeds, task.n_goals, plays.n_episodes, task.horizon)
    return rewards.reshape(shape).sum(axis=3).swapaxes(0, 1), cost


def _seed_of(arm: Arm, seed: int) -> int:
    """A seed of an arm's own: what it draws does not depend on which arms play beside it."""
    return zlib.crc32(f"{seed} {arm.key}".encode())


def _read(entry: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns `(G, R, E)` and costs a decision of a kept arm."""
    cost = Cost(**entry["cost"], **entry["seconds"])
    per_decision = 1000 / max(1, cost.decisions)
    return np.array(entry["returns"], dtype=np.float64), {
        "kept_mean": cost.kept_mean,
        "kept_min": cost.kept_min,
        "kept_max": cost.kept_max,
        "identical_to_full": cost.identical_to_full,
        "tokens_per_decision": cost.tokens_per_decision,
        "ms_selecting": cost.seconds_selecting * per_decision,
        "ms_model": cost.seconds_model * per_decision,
    }


def fingerprint(task: Task, plays: Plays, code: str) -> dict[str, Any]:
    """Everything that the returns of an arm depend on, as plain values.

    Args:
        task: the model and the environment.
        plays: how often each arm plays.
        code: digest of the program (`kept_results.code_digest`).
    """
    return {
        **task.identity,
        "goals": list(task.goals),
        "horizon": task.horizon,
        "n_max": task.view.n_max,
        "positions": task.view.positions,
        "device": torch.device(task.view.device).type,
        "seeds": plays.n_seeds,
        "episodes": plays.n_episodes,
        "seed": plays.seed,
        "code": code,
    }
