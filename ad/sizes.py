"""The goals of a training run, and can it be? `check_sizes(env, source, model, train)` tells."""

import numpy as np

from ad.darkroom import N_ACTIONS, TASKS, split_goals
from ad.evaluation import possible
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from historylens.common.batches import expect_memory
from historylens.common.errors import expect


def goals_of(env: EnvConfig) -> dict[str, np.ndarray]:
    """The goals to train on, to validate on and to test on, as `split_goals` gives them."""
    n_test, n_validation = env.n_test_goals, env.n_validation_goals
    names = env.env, env.n_train_goals
    return split_goals(env.goal_seed, env.grid_size, n_test, n_validation, *names)


def check_sizes(
    env: EnvConfig, source: SourceConfig, model: ModelConfig, train: TrainConfig
) -> None:
    """UserError: settings that no memory holds, or under which nothing can be learned."""
    expect_memory(n_bytes(env, source, model, train), "the sizes")
    what = f"expected --epsilon-start of at least --epsilon-end {source.epsilon_end}"
    is_falling = source.epsilon_start >= source.epsilon_end
    expect(is_falling, f"{what}, got {source.epsilon_start}")
    n_steps, n_context = source.n_source_steps // env.horizon * env.horizon, model.n_transit - 1
    what = f"expected --n-source-steps of more than {n_context} steps in whole episodes of "
    what = f"histories too short for the context: {what}{env.horizon}, got {n_steps}"
    expect(n_steps > n_context, what)
    for name, goals in goals_of(env).items():
        is_near = possible(env, goals).any()
        expect(is_near, f"no {name} goal can be reached within --horizon {env.horizon}")


def n_bytes(env: EnvConfig, source: SourceConfig, model: ModelConfig, train: TrainConfig) -> float:
    """Memory that a run takes at the least: histories, weights six times, a batch, rollouts."""
    cells, tokens, n_hidden = env.grid_size**2, 2 * model.n_transit, len(TASKS[env.env].hidden)
    layers = model.tf_n_layer * (4 * model.tf_n_embd + 2 * model.tf_n_inner)  # numbers a token
    weights = model.tf_n_embd * (layers + tokens + cells)
    n_rooms = max(train.final_rollouts * env.n_test_goals, train.eval_rollouts)
    n_learners = (env.n_train_goals or cells**n_hidden) * source.n_streams
    steps = n_learners * (source.n_source_steps + (n_hidden + 1) * cells * N_ACTIONS)
    steps += n_rooms * train.eval_episodes * env.horizon
    return 8.0 * steps + 24.0 * weights + train.batch_size * tokens * layers
