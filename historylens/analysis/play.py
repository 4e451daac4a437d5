"""An agent's own play on its tasks, watched: what it went through, and what it attended to.

    play = record(job)                     # weights fixed, actions drawn from the policy, seeded
    agent.look_at(play.choose(64, seed=0))
    play.shares                            # of every decision, not only of those chosen

Axes: `R` rollouts, `N` steps of each, `L` layers, `K` kinds of the `n` transitions before a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from historylens.agent import Environment, rollout, seed_globals
from historylens.analysis.job import Job, see
from historylens.common.batches import MAX_ROOMS, MAX_TOKENS_ACTING, even_parts
from historylens.history import CONTEXT, Decision, History, HistoryBuffer, spread_decisions

KINDS: dict[str, Callable[[History], Tensor]] = {  # which transitions `(B, n)` are of a kind
    "current episode": lambda history: history.episodes == history.query_episodes[:, None],
    "last episode": lambda history: history.episodes == history.query_episodes[:, None] - 1,
    "older": lambda history: history.episodes < history.query_episodes[:, None] - 1,
    "rewarded": lambda history: history.rewarded,
    "same state": lambda history: history.same_state,
}
LABELS = ("task", "rollout", "episode", "step")
PLAYED = (*CONTEXT, "episodes")


@dataclass(frozen=True)
class Play:
    """What `R` rollouts went through, and the attention with which each step was decided."""

    environment: Environment
    n_max: int  # transitions that the agent can read
    rewarded_above: float
    tasks: np.ndarray  # (R,) int
    states: np.ndarray  # (R, N, S), and what else a step has, as in a `Decision`
    actions: np.ndarray
    rewards: np.ndarray
    next_states: np.ndarray
    episodes: np.ndarray
    shares: np.ndarray  # (R, N, L, K) float32, of the query's attention on each of KINDS
    even: np.ndarray  # (R, N, K) float32, of uniform attention
    rows: np.ndarray | None  # (N, L, n_max + 1) of one rollout, the latest last; NaN: none yet

    def choose(self, n_samples: int, seed: int) -> list[Decision]:
        """Spread decisions over tasks, rollouts and episodes; all of them where they are fewer."""
        by_task = [np.flatnonzero(self.tasks == i) for i in range(len(self.environment.goals))]
        steps = np.arange(self.rewards.shape[1])
        places = spread_decisions(by_task, steps, n_samples, np.random.default_rng(seed))
        return [self.decision(*place) for place in places]

    def decision(self, rollout: int, step: int) -> Decision:
        """A step as a decision, on views of what could be read before it."""
        environment, context = self.environment, slice(max(0, step - self.n_max), step)
        task, episode = int(self.tasks[rollout]), int(self.episodes[rollout, step])
        goals, goal = environment.goal_states, environment.goals[task]
        return Decision(
            **{name: getattr(self, name)[rollout, context] for name in PLAYED},
            query_state=self.states[rollout, step],
            title=f"own play: {environment.named[0]} {goal}, rollout {rollout}, "
            f"episode {episode + 1} of {self.episodes[rollout, -1] + 1}, step {step}",
            labels=dict(zip(LABELS, (goal, rollout, episode + 1, step), strict=True)),
            task=task,
            query_episode=episode,
            goal=None if goals is None else goals[task],
            rewarded_above=self.rewarded_above,
        )


def record(job: Job) -> Play:
    """Let the agent play each of its tasks, and watch it; the same on all processes of the job.

    Rollout i is of task `i % n_tasks`; what happens by chance in it depends on the seed and on i
    alone. UserError: the attention cannot be captured.
    """
    agent, config, environment = job.agent, job.config, job.agent.environment
    n_tasks, n_steps = len(environment.goals), config.episodes * environment.horizon
    tasks = np.arange(n_tasks * config.rollouts) % n_tasks
    size = min(MAX_ROOMS, max(1, MAX_TOKENS_ACTING // (agent.n_max + 1)))
    parts = even_parts(0, len(tasks), size)
    own = [parts[i] for i in job.group.share(len(parts))]
    with job.progress("own play", sum(map(len, own)) * n_steps, " decisions") as bar:
        watched = [_watch(job, part, tasks[part], n_steps, bar) for part in own]
    in_order = job.group.all_of(len(parts), watched)
    arrays = {name: np.concatenate([part[name] for part in in_order]) for name in in_order[0]}
    rows = arrays.pop("rows")  # of the one that is followed, if any
    about = environment, agent.n_max, agent.rewarded_above, tasks
    return Play(*about, **arrays, rows=rows[0] if len(rows) else None)


def _watch(
    job: Job, rollouts: range, tasks: np.ndarray, n_steps: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """Play some of the rollouts, and keep the attention of each decision: `Play`'s arrays."""
    agent, seeds = job.agent, [job.config.seed + number for number in rollouts]
    followed = [i for i, number in enumerate(rollouts) if number == job.config.trajectory]
    shape = len(rollouts), n_steps, len(job.layers), len(KINDS)
    shares = np.empty(shape, dtype=np.float32)
    even = np.empty((*shape[:2], len(KINDS)), dtype=np.float32)
    shape = len(followed), n_steps, len(job.layers), agent.n_max + 1
    followed_rows = np.full(shape, np.nan, dtype=np.float32)
    played: HistoryBuffer

    def act(buffer: HistoryBuffer, query_states: Tensor) -> Tensor:
        nonlocal played
        played, t = buffer, buffer.n
        history = buffer.history(query_states, max(0, t - agent.n_max))
        history = replace(history, rewarded_above=agent.rewarded_above)
        batch = see(job, history)
        rows = np.stack([heads.mean(1) for heads in batch.rows], 1)  # (B, L, n + 1)
        kinds = torch.stack([rule(history) for rule in KINDS.values()], 1).cpu().numpy()
        shares[:, t] = np.einsum("bln,bkn->blk", rows[..., :-1], kinds)
        even[:, t] = np.einsum("bn,bkn->bk", batch.even[:, :-1], kinds)
        followed_rows[:, t, :, -rows.shape[2] :] = rows[followed]
        return batch.logits

    seed_globals(seeds[0] % 2**32)
    noises = [np.random.default_rng((job.config.seed, number)) for number in rollouts]
    policy = SimpleNamespace(act=act, device=agent.device)
    rollout(agent.environment.make(tasks, seeds), policy, n_steps, noises, bar, tasks)
    history = played.history(None)
    arrays = {name: getattr(history, name).cpu().numpy() for name in PLAYED}
    return arrays | {"shares": shares, "even": even, "rows": followed_rows}
