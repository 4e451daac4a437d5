"""Play arms of compressed history in an agent's environment, paired, and keep what they earned.

    arms = plan(agent, ["recent", "rewarded-recent"], [10, 20], plays)
    results, note = open_results(out, fingerprint(agent, plays))
    played = play_arms(agent, arms, plays, results)

Every arm acts on the same goals with the same action noise: that of an environment depends on the
seed and the environment's number alone. After each arm the results are on disk, so that an
interrupted comparison goes on where it was.
"""

import contextlib
import hashlib
import inspect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from historylens.agent import Agent, Environment, rollout
from historylens.common.batches import MAX_ROOMS, even_parts
from historylens.common.errors import UserError
from historylens.comparison.policy import CompressedPolicy, Positions
from historylens.comparison.results import ResultsFile
from historylens.comparison.study import EMPTY, FULL, RECENT, Arm, Result
from historylens.compression.method import METHODS, get_method

CONFIRMING = 10**9  # between the seed of a comparison and that of the runs that confirm it
CODE = (  # files here, beside the agent's, that returns depend on
    "agent.py", "history.py", "tokens.py", "capture/*.py", "compression/*.py",
    "comparison/playing.py", "comparison/policy.py",
)  # fmt: skip


@dataclass(frozen=True)
class Plays:
    """How each arm plays.

    Attributes:
        n_seeds: runs `R` of each goal.
        n_episodes: episodes `E` of a run.
        seed: of action noise and of what strategies draw.
        positions: where kept transitions stand.
    """

    n_seeds: int
    n_episodes: int
    seed: int
    positions: Positions = "reindexed"

    def confirming(self, n_seeds: int) -> "Plays":
        """Runs of other action noise, for one arm that these runs point to."""
        return replace(self, n_seeds=n_seeds, seed=self.seed + CONFIRMING)

    def n_decisions(self, environment: Environment) -> int:
        """Decisions that an arm makes."""
        return len(environment.goals) * self.n_seeds * self.n_episodes * environment.horizon


def plan(agent: Agent, names: Sequence[str], budgets: Sequence[int], plays: Plays) -> list[Arm]:
    """The arms to play: full, empty and the controls, then each strategy at each budget.

    With a single goal there is no other task, and that control is left out.

    Raises:
        UserError: an unknown strategy, or a budget that the model or the history cannot serve.
    """
    environment = agent.environment
    if not agent.n_max:
        raise UserError(f"{agent.title}: it reads no history: there is nothing to compress")
    n_steps = plays.n_episodes * environment.horizon
    for budget in budgets:
        if not 1 <= budget <= agent.n_max:
            raise UserError(
                f"expected --budgets in 1..{agent.n_max}, the transitions that this model can "
                f"read, got {budget}"
            )
        if n_steps <= budget:
            raise UserError(
                f"history shorter than the budget: {plays.n_episodes} episodes of "
                f"{environment.horizon} steps never hold more than {n_steps - 1} transitions, and "
                f"nothing is compressed at --budgets {budget}: expected more --episodes or a "
                "smaller budget"
            )
    try:
        chosen = [get_method(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise UserError(str(error)) from None
    controls = [name for name, method in METHODS.items() if method.kind == "control"]
    if len(environment.goals) == 1:
        controls.remove("other-task")
    arms = [Arm(name) for name in (FULL, EMPTY, *controls)]
    with_budget = [method.name for method in chosen if method.keeps not in ("all", "none")]
    return arms + [Arm(name, budget) for name in with_budget for budget in sorted(set(budgets))]


def played_as(arm: Arm, agent: Agent) -> Arm:
    """The arm itself, or full history where that is the same: all that the model can read is kept.

    It is for recency, and for what looks at attention: that chooses among what the model can read.
    """
    looks = arm.method.looks_at.endswith("attention")
    is_full = arm.n_keep == agent.n_max and (arm.name == RECENT or looks)
    return Arm(FULL) if is_full else arm


def missing(agent: Agent, arms: Sequence[Arm], results: ResultsFile) -> list[Arm]:
    """The arms that are still to be played."""
    return [arm for arm in arms if arm.key not in results.by_key and played_as(arm, agent) == arm]


def play_arms(
    agent: Agent, arms: Sequence[Arm], plays: Plays, results: ResultsFile
) -> list[Result]:
    """Play the arms that are still missing, keep each as soon as it is finished; gives all."""
    todo = missing(agent, arms, results)
    total = len(todo) * plays.n_decisions(agent.environment)
    with tqdm(total=total, unit=" decisions", unit_scale=True, disable=not todo) as bar:
        for i, arm in enumerate(todo):
            bar.set_description(f"{arm.key} ({i + 1} of {len(todo)} arms)")
            results.add(play(agent, arm, plays, bar))
    return [replace(results.by_key[played_as(arm, agent).key], arm=arm) for arm in arms]


def play(agent: Agent, arm: Arm, plays: Plays, bar: tqdm | None = None) -> Result:
    """Play one arm.

    Goals take turns among the environments, so that every batch of them holds several.
    """
    environment = agent.environment
    n_goals, n_steps = len(environment.goals), plays.n_episodes * environment.horizon
    # A seed of the arm's own: what it draws does not depend on which arms play beside it.
    seed = zlib.crc32(f"{plays.seed} {arm.key}".encode())
    generator = torch.Generator().manual_seed(seed)
    policy = CompressedPolicy(agent, arm.method, arm.n_keep, generator, plays.positions)
    parts = []
    for part in even_parts(0, n_goals * plays.n_seeds, MAX_ROOMS):
        goals = np.array(part) % n_goals
        noises = [np.random.default_rng((plays.seed, number)) for number in part]
        parts.append(rollout(environment.make(goals), policy, n_steps, noises, bar, goals))
    shape = (plays.n_seeds, n_goals, plays.n_episodes, environment.horizon)
    earned = np.concatenate(parts).reshape(shape).sum(axis=3).swapaxes(0, 1)
    # In memory as when read from a file: sums over it then are the same to the last digit.
    return Result(arm, np.array(earned, dtype=np.float64, order="C"), policy.cost)


def fingerprint(agent: Agent, plays: Plays) -> dict[str, Any]:
    """Everything that the returns of an arm depend on, as plain values."""
    return {
        **agent.identity,
        "goals": list(agent.environment.goals),
        "horizon": agent.environment.horizon,
        "n_max": agent.n_max,
        "positions": plays.positions,
        "device": torch.device(agent.device).type,
        "seeds": plays.n_seeds,
        "episodes": plays.n_episodes,
        "seed": plays.seed,
        "code": code_digest(agent),
    }


def code_digest(agent: Agent) -> str:
    """Digest of the program's files that returns depend on: changed code plays anew.

    They are those of `CODE`, all files beside that of the agent's class, and that of its model's.
    """
    root = Path(__file__).parents[1]
    paths = {path for pattern in CODE for path in root.glob(pattern)}
    paths.update(Path(inspect.getfile(type(agent))).parent.glob("*.py"))
    with contextlib.suppress(TypeError, OSError):  # made at run time, it has no file
        paths.add(Path(inspect.getfile(type(agent.model))))
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()
