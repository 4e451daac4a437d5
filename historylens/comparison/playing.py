"""Play arms of compressed history in an agent's environment, paired, and keep what they earned.

Every arm acts on the same goals with the same action noise. It is played in blocks of its seeds,
which are what processes share, what is kept, and between which a race may end.
"""

import contextlib
import hashlib
import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from historylens.agent import Agent, Unreadable, rollout, seed_globals
from historylens.common.batches import MAX_ROOMS, even_parts
from historylens.common.errors import UserError, expect, note
from historylens.common.processes import ALONE, Group
from historylens.comparison.intervals import looks
from historylens.comparison.policy import CompressedPolicy
from historylens.comparison.results import ResultsFile
from historylens.comparison.study import EMPTY, FULL, RECENT, Arm, Result
from historylens.compression.method import METHODS, get_method

CODE = (  # files here, beside the agent's, that returns depend on
    "agent.py", "history.py", "tokens.py", "capture/*.py", "compression/*.py",
    "comparison/playing.py", "comparison/policy.py", "common/steady.py",
)  # fmt: skip
Block = tuple[Arm, range]  # an arm's runs of some seeds
MAY_LACK = {"norm", "contribution", "head_attention"}  # what not every model shows, or of each head


@dataclass(frozen=True)
class Plays:
    """How each arm plays in the environment of an agent."""

    agent: Agent
    n_seeds: int  # runs R of each goal
    n_episodes: int  # episodes E of a run
    seed: int = 0  # of action noise and of what strategies draw
    positions: str = "reindexed"  # of POSITIONS: where kept transitions stand

    @property
    def n_decisions(self) -> int:
        """Decisions that an arm makes with one seed of each goal."""
        environment = self.agent.environment
        return len(environment.goals) * self.n_episodes * environment.horizon

    @property
    def blocks(self) -> list[range]:
        """Seeds that are played together: none beyond a look, nor more than go well together."""
        most, ends = max(1, MAX_ROOMS // len(self.agent.environment.goals)), looks(self.n_seeds)
        return [part for pair in pairwise([0, *ends]) for part in even_parts(*pair, most)]


def plan(plays: Plays, names: Sequence[str], budgets: Sequence[int]) -> list[Arm]:
    """The arms to play: full, empty and the controls, then each strategy at each budget.

    UserError: an unknown strategy, none for this model, or a budget that cannot be served.
    """
    agent, environment = plays.agent, plays.agent.environment
    n_steps = plays.n_episodes * environment.horizon
    expect(agent.n_max, f"{agent.title}: it reads no history: there is nothing to compress")
    readable = f"1..{agent.n_max}, the transitions that this model can read"
    steps = f"{plays.n_episodes} episodes of {environment.horizon} steps"
    too_short = f"history shorter than the budget: {steps} never hold more than {n_steps - 1} "
    too_short += "transitions, and nothing is compressed at --budgets"
    for budget in budgets:
        expect(1 <= budget <= agent.n_max, f"expected --budgets in {readable}, got {budget}")
        instead = "expected more --episodes or a smaller budget"
        expect(budget < n_steps, f"{too_short} {budget}: {instead}")
    try:
        chosen = [get_method(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise UserError(str(error)) from None
    controls = [name for name, method in METHODS.items() if method.kind == "control"]
    if len(environment.goals) == 1:
        controls.remove("other-task")
    chosen, hidden = [method for method in chosen if method.keeps not in ("all", "none")], {}
    expect(chosen, f"expected --strategies beside full and empty, got {', '.join(names)}")
    for method in chosen:
        if MAY_LACK & {*method.needs}:  # UserError: a head it lacks
            policy = CompressedPolicy(agent, method, 1, torch.Generator().manual_seed(0))
            room = environment.make(np.zeros(1, dtype=np.int64), [0])
            try:
                rollout(room, policy, 3, [np.random.default_rng(0)])
            except Unreadable as error:
                hidden[method.name] = str(error)
    names = [method.name for method in chosen if method.name not in hidden]
    if hidden:
        said = f"without {', '.join(hidden)}: {next(iter(hidden.values()))}"
        expect(names, f"nothing is left to compare {said}")
        note(said)
    arms = [Arm(name) for name in (FULL, EMPTY, *controls)]
    return arms + [Arm(name, budget) for name in names for budget in sorted(set(budgets))]


def _played_as(plays: Plays, arm: Arm) -> Arm:
    """The arm itself, or full history where that is the same: it keeps all that the model reads."""
    of_window = arm.name == RECENT or arm.method.looks_at.endswith("attention")
    return Arm(FULL) if of_window and arm.n_keep == plays.agent.n_max else arm


def missing(
    plays: Plays, arms: Sequence[Arm], results: ResultsFile, until: int | None = None
) -> list[Block]:
    """What is still to be played of the first `until` seeds, that which takes longest first."""

    def n_tokens(block: Block) -> int:  # about; attention is looked at in a slower pass
        (arm, seeds), n_max = block, plays.agent.n_max
        kept = 0 if arm.method.keeps == "none" else arm.n_keep or n_max
        return len(seeds) * (kept + 2 * n_max * arm.method.looks_at.endswith("attention"))

    own = [arm for arm in dict.fromkeys(arms) if _played_as(plays, arm) == arm]
    early = [seeds for seeds in plays.blocks if until is None or seeds.stop <= until]
    blocks = [(a, s) for a in own for s in early if (a.key, s.start) not in results.blocks]
    return sorted(blocks, key=n_tokens, reverse=True)


def play_arms(
    plays: Plays,
    arms: Sequence[Arm],
    results: ResultsFile | None,
    race: Callable[[list[Result], float], list[Arm]] | None = None,
    group: Group = ALONE,
) -> list[Result]:
    """Play what is missing, by all processes, keep each block as it is finished; gives all arms.

    At a look a `race` says which go on, by results so far and its part of the level. Rank 0 has the
    `results`; the others have None, are told what to play, and give nothing.
    """
    own = {arm: _played_as(plays, arm) for arm in arms} if results is not None else {}
    going = list(dict.fromkeys(own.values()))
    until, n_decisions = dict.fromkeys(going, 0), plays.n_decisions

    def work(block: Block, see: Callable[[], None]) -> tuple[int, Result]:
        told = SimpleNamespace(update=lambda n: (bar.update(n), see()))
        bar.set_description(block[0].key)
        return group.rank, play(plays, *block, told)

    def keep(given: tuple[int, Result]) -> None:
        rank, result = given
        results.add(result)
        bar.update(result.returns.shape[1] * n_decisions * (rank > 0))

    def n_left() -> int:
        return sum(len(seeds) for _, seeds in missing(plays, going, results)) * n_decisions

    with tqdm(total=n_left(), unit=" decisions", unit_scale=True, disable=n_left() == 0) as bar:
        for end, share in ({plays.n_seeds: 1.0} if race is None else looks(plays.n_seeds)).items():
            group.spread(group.broadcast(missing(plays, going, results, end)), work, keep)
            until |= dict.fromkeys(going, end)
            if going and end < plays.n_seeds:
                going = race([results.of(arm, end) for arm in going], share)
                bar.total = bar.n + n_left()  # what stopped is not played
    return [replace(results.of(one, until[one]), arm=arm) for arm, one in own.items()]


def play(plays: Plays, arm: Arm, seeds: range | None = None, bar: Any = None) -> Result:
    """Play an arm, all seeds or a block of them; `bar` is told of decisions by `update`.

    Where environments end episodes before the horizon, the return of a block of `horizon` steps is
    its reward divided by the episodes in it, of which the last is cut.
    """
    seeds = range(plays.n_seeds) if seeds is None else seeds
    environment, parts = plays.agent.environment, []
    n_goals, n_steps = len(environment.goals), plays.n_episodes * environment.horizon
    # A seed of the block's own: what it draws does not depend on what is played beside it.
    seed = zlib.crc32(f"{plays.seed} {arm.key} {seeds.start}".encode())
    seed_globals(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = CompressedPolicy(plays.agent, arm.method, arm.n_keep, generator, plays.positions)
    for part in even_parts(n_goals * seeds.start, n_goals * seeds.stop, MAX_ROOMS):
        goals = np.array(part) % n_goals  # they take turns
        noises = [np.random.default_rng((plays.seed, number)) for number in part]
        rooms = environment.make(goals, [plays.seed + number for number in part])
        parts.append(rollout(rooms, policy, n_steps, noises, bar, goals))
    shape = (len(seeds), n_goals, plays.n_episodes, environment.horizon)
    rewards, ends = (np.concatenate(part).reshape(shape) for part in zip(*parts, strict=True))
    n_ended = ends.sum(axis=3)
    earned = (rewards.sum(axis=3) / n_ended).swapaxes(0, 1)
    # In memory as when read from a file: sums over it then are the same to the last digit.
    returns, n_early = np.array(earned, dtype=np.float64, order="C"), int((n_ended - 1).sum())
    return Result(arm, returns, policy.cost, n_early, seeds.start)


def fingerprint(plays: Plays) -> dict[str, Any]:
    """Everything that the returns of an arm depend on, code included, as plain values."""
    agent, root = plays.agent, Path(__file__).parents[1]
    paths = {path for pattern in CODE for path in root.glob(pattern)}
    paths.update(Path(inspect.getfile(type(agent))).parent.glob("*.py"))
    with contextlib.suppress(TypeError, OSError):  # made at run time, it has no file
        paths.add(Path(inspect.getfile(type(agent.model))))
    return {
        **agent.identity,
        "goals": list(agent.environment.goals),
        "horizon": agent.environment.horizon,
        "n_max": agent.n_max,
        "rewarded_above": agent.rewarded_above,
        "positions": plays.positions,
        "device": torch.device(agent.device).type,
        "seeds": plays.n_seeds,
        "blocks": [[seeds.start, seeds.stop] for seeds in plays.blocks],
        "episodes": plays.n_episodes,
        "seed": plays.seed,
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest(),
    }
