"""The AD model as an agent: decisions, passes as its own forward gives them, rooms, its score."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import hostile
import numpy as np
import pytest
import torch
from conftest import ad_agent, make_histories, random_window, sharp_model, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_room import PlainRoom, plain_play

from ad import acting, evaluation
from ad.acting import SlidingPolicy, fast_logits
from ad.agent import load_for_analysis
from ad.darkroom import DarkRoom, all_goals
from ad.decisions import HistoryDecisions, Place, choose_decisions
from ad.evaluation import rollout_goals, score
from ad.training import Settings, Trainer
from config import EnvConfig, ModelConfig, VisualizeConfig
from dataset import CONTEXT, context_steps
from historylens.common.errors import UserError
from historylens.compression.method import METHODS
from historylens.history import History, HistoryBuffer

SHAPES = [(12, 1, 1, 8), (12, 2, 2, 16), (20, 3, 4, 16), (2, 2, 1, 8)]  # T, L, H, D
MODELS = {
    shape: sharp_model(ModelConfig(*shape, tf_n_inner=24, grid_size=5), dtype=torch.float64)
    for shape in SHAPES
}


def random_steps(model, n_rooms, n):
    """From two steps to the transitions between them, and the query state at the second."""
    window, queries = random_window(model.config, n_rooms, n)
    return lambda first, last: History(
        *(part[:, first:last] for part in window), query_states=queries[:, last]
    )


@torch.inference_mode()
def assert_read(found, model, history, *positions):
    expected = model(*history.inputs, *positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@settings(max_examples=10)
@example(shape=SHAPES[1], n_rooms=3, asked=[0, 0, 3, 3, 11, 12, 12, 13, 30], horizon=1)
@example(shape=SHAPES[1], n_rooms=2, asked=[2, 5, 9, 10, 10, 14, 24, 25], horizon=5)
@given(
    shape=st.sampled_from(SHAPES), n_rooms=st.integers(1, 3),
    asked=st.lists(st.integers(0, 30), max_size=9).map(sorted), horizon=st.integers(1, 9),
)  # fmt: skip
def test_a_policy_reads_its_context_as_one_forward_pass_would(shape, n_rooms, asked, horizon):
    model = MODELS[shape]
    sliding = "episode" if 1 < horizon <= model.n_context_max // 2 else "step"
    together = horizon if sliding == "episode" else 1  # steps that drop out together
    policy = SlidingPolicy(model, n_rooms, sliding, horizon)
    steps = random_steps(model, n_rooms, 30)
    buffer, first = HistoryBuffer(steps(0, 0).query_states, 30), 0
    for t in asked:
        while buffer.n < t:
            *new, _ = steps(buffer.n, buffer.n + 1).inputs
            buffer.append(*(part[:, 0] for part in new), done=False)
        last = t - t % together + together - 1
        while last - first > model.n_context_max:
            first += together
        expected = steps(first, t)
        assert_read(policy.act(buffer, expected.query_states), model, expected)


@given(st.sampled_from([1, 25, 10_000]), st.sampled_from(SHAPES), st.integers(1, 7), st.data())
def test_fast_logits_are_those_of_the_own_forward_at_any_positions(at_once, shape, size, data):
    """`at_once`: tokens, how a large batch is cut."""
    model = MODELS[shape]
    n = data.draw(st.integers(0, model.n_context_max))
    history = random_steps(model, size, n)(0, n)
    places = st.lists(st.integers(0, shape[0] - 1), min_size=n + 1, max_size=n + 1, unique=True)
    positions = torch.tensor([sorted(data.draw(places)) for _ in range(size)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acting, "TOKENS_AT_ONCE", at_once)
        assert_read(fast_logits(model, history), model, history)
        assert_read(fast_logits(model, history, positions), model, history, positions)


def plain_shown(reads, n_max, horizon, history):
    if reads == "compressed":
        return METHODS["rewarded-recent"].compress(history, 10)
    n_own = history.n % horizon if reads == "episode" else history.n
    n_before = history.n - n_own
    while n_before > 0 and n_before + horizon - 1 > n_max:  # as the own episode will fill up
        n_before -= horizon
    return history.latest(min(n_before + n_own, n_max))


CASES = [("step", *case) for case in ((12, 5, 6), (1, 4, 5), (2, 4, 5), (40, 3, 6))]
CASES += [("episode", *case) for case in ((12, 5, 5), (11, 5, 5), (13, 6, 4), (12, 14, 1))]
CASES += [("compressed", 12, 6, 10)]


@pytest.mark.parametrize(("reads", "n_transit", "n_episodes", "horizon"), CASES)
def test_rooms_together_act_as_each_alone(tiny_config, reads, n_transit, n_episodes, horizon):
    model = sharp_model(replace(tiny_config, n_transit=n_transit, grid_size=3), dtype=torch.float64)
    goals = np.array([[1, 1], [0, 1], [2, 1], [1, 2]])
    returns = rollout_goals(model, goals, n_episodes, seed=3, horizon=horizon, reads=reads)
    for i, goal in enumerate(goals):
        noise = np.random.default_rng((3, i)).gumbel(size=(n_episodes * horizon, 5))
        shown = partial(plain_shown, reads, n_transit - 1, horizon)
        rewards, _ = plain_play(model, PlainRoom(goal, 3, horizon), noise, shown)
        assert returns[i].tolist() == np.reshape(rewards, (n_episodes, horizon)).sum(1).tolist()
    assert returns.sum() > 0


def test_a_context_too_short_or_too_long_is_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"two episodes \(12 transitions\).*got 11"):
        rollout_goals(tiny_model, np.array([[2, 2]]), 1, seed=0, horizon=6, reads="episode")
    with pytest.raises(ValueError, match="at most 11 context transitions"):
        fast_logits(tiny_model, random_steps(tiny_model, 1, 12)(0, 12))


def test_returns_are_whole_rewards_seeded_by_room_whatever_rooms_are_beside_it(tiny_config):
    model = sharp_model(tiny_config, dtype=torch.float64)
    goals = np.tile(all_goals(5), (3, 1))  # more than step together at once
    many, other = (rollout_goals(model, goals, 3, seed, horizon=8) for seed in (0, 1))
    assert (many.shape, many.dtype) == ((75, 3), np.int64)
    assert np.array_equal(rollout_goals(model, goals[:30], 3, seed=0, horizon=8), many[:30])
    assert not np.array_equal(many, other)
    assert not np.array_equal(many[:25], many[25:50])  # the same goals
    assert rollout_goals(model, goals, n_episodes=0, seed=0).shape == (75, 0)


def test_acting_leaves_the_model_as_it_was_and_uses_no_dropout(tiny_config):
    model = sharp_model(replace(tiny_config, tf_dropout=0.9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calm = rollout_goals(model, all_goals(5), 2, seed=0, horizon=8)
    assert not any(part.training for part in model.modules())
    assert np.array_equal(calm, rollout_goals(model.train(), all_goals(5), 2, 0, horizon=8))
    assert all(part.training for part in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_each_room_starts_by_a_chance_of_its_own(tiny_model, monkeypatch):
    made = mock.Mock(side_effect=DarkRoom)
    monkeypatch.setattr(evaluation, "DarkRoom", made)
    goals = np.tile([0, 1, 2, 3], (3, 1))
    rollout_goals(tiny_model, goals, 2, seed=7, horizon=5, env="key-to-door")
    assert made.call_args.args[-1].tolist() == [7, 8, 9]


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


CPU = torch.device("cpu")


def histories_of(goals=((0, 0), (0, 1), (1, 1)), streams=2, episodes=10):
    goals = [goal for goal in goals for _ in range(streams)]
    return make_histories(goals, episodes, horizon=4, grid_size=3)


def test_histories_take_turns_stages_are_spread_evenly_and_the_seed_chooses():
    chosen = choose_decisions(histories_of(), n_context=6, n_samples=12, seed=0)
    assert np.bincount([place.history for place in chosen]).tolist() == [2] * 6
    chosen = choose_decisions(histories_of(episodes=100), n_context=0, n_samples=10, seed=3)
    assert sorted(place.step // 40 for place in chosen) == list(range(10))  # of 400 steps
    first, again, other = (choose_decisions(histories_of(), 6, 8, seed) for seed in (1, 1, 2))
    assert first == again != other


@settings(max_examples=15)
@given(st.integers(1, 300), st.integers(0, 20), st.integers(1, 3), st.integers(0, 99))
def test_decisions_are_distinct_and_have_a_full_context(n_samples, n_context, stride, seed):
    histories = histories_of(goals=((0, 0), (2, 1)), streams=3, episodes=24)
    chosen = choose_decisions(histories, n_context, n_samples, seed, stride)
    assert len(set(chosen)) == len(chosen)

    def is_full(step):
        return context_steps(step, n_context, stride, histories.horizon).min(initial=0) >= 0

    assert all(is_full(place.step) for place in chosen)
    assert len(chosen) == min(n_samples, 6 * sum(map(is_full, range(histories.n_steps))))


def test_filters_by_goal_history_and_steps():
    only = {"goals": [(0, 1), (1, 1)], "rows": [0, 3, 4], "bounds": (10, 19)}
    chosen = choose_decisions(histories_of(), 6, 20, seed=0, **only)
    assert set(chosen) == {(h, t, 1) for h in (3, 4) for t in range(10, 20)}


@pytest.mark.parametrize(("n_context", "only", "message"), [
    (6, {"goals": [(5, 5)]}, "no history of goal 5,5: expected one of 0,0; 0,1; 1,1"),
    (6, {"rows": [6]}, r"expected histories in 0\.\.5, got 6"),
    (6, {"bounds": (0, 5)}, "expected steps between 6 .* and 39, got 0:5"),
    (6, {"goals": [(0, 0)], "rows": [5]}, "no history is of a goal asked for"),
    (40, {}, r"too short .*: expected 40 transitions before a decision \(stride 1\)"),
])  # fmt: skip
def test_what_leaves_no_decision_says_what_would(n_context, only, message):
    with pytest.raises(UserError, match=message):
        choose_decisions(histories_of(), n_context, 4, seed=0, **only)


def test_a_decision_is_named_and_holds_what_lies_before_it():
    histories = histories_of()
    places = [Place(3, 14), Place(0, 17, stride=2), Place(4, 9), Place(2, 9)]
    decisions = HistoryDecisions(histories, places, 6)
    assert [decision.task for decision in decisions] == [1, 0, 2, 1]  # numbers of their goals
    first, second = decisions[0], decisions[1]
    assert first.title == "goal (0, 1), history 3, episode 4 of 10, step 14"
    assert first.episode_starts.tolist() == [0, 4]  # steps 8-11, then 12 and 13
    assert first.labels == {"goal_row": 0, "goal_col": 1, "history": 3, "step": 14, "stride": 1}
    for name in CONTEXT:
        assert np.array_equal(getattr(first, name), getattr(histories, name)[3, 8:14])
    assert np.array_equal(first.query_state, histories.states[3, 14])
    assert second.episode_starts.tolist() == [0, 1, 5]  # of episodes 0, 2 (8-11) and 4
    assert second.title.endswith(", step 17, one episode in 2")


def test_both_passes_are_the_model_and_one_takes_positions(tiny_model, tiny_histories):
    agent = ad_agent(tiny_model, tiny_histories, [(0, 12), (2, 29), (1, 17)])
    assert (agent.n_max, agent.n_tokens, agent.length(1), agent.n_heads) == (11, 12, 11, [2, 2])
    layers = list(tiny_model.transformer_encoder.layers)
    assert [agent.model.get_submodule(name) for name in agent.layers] == layers
    history, positions = agent.history([0, 2]), torch.arange(12).flip(0).expand(2, -1)
    with torch.inference_mode():
        expected = tiny_model(*history.inputs)
        moved = tiny_model(*history.inputs, positions)
        torch.testing.assert_close(agent.forward(history), expected)
    torch.testing.assert_close(agent.act(history), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.act(history, positions), moved, rtol=1e-4, atol=1e-5)


def test_an_analysis_has_decisions_and_says_what_was_loaded(run_file):
    agent = load_for_analysis(VisualizeConfig(checkpoint=str(run_file), num_samples=4), CPU)
    assert agent.act(History.of(agent.decisions)).shape == (4, 5)
    facts = " ".join(f"{name}: {text}" for name, text in agent.facts.items())
    assert f"Checkpoint: {run_file} (the file asked for) Step: 5 gradient updates" in facts
    assert "Model: 2 layers x 2 heads, width 16, " in facts
    assert "Context length: 11 transitions, then the query token (12 tokens)" in facts
    assert "(3 of 30 steps, 3 goals) Samples: 4 decisions of 3 goals" in facts
    one = load_for_analysis(VisualizeConfig(checkpoint=str(run_file), num_samples=1), CPU)
    assert re.fullmatch(r"1 decision of 1 goal and 1 history, step \d+", one.facts["Samples"])
    names = ["checkpoint", "step", "histories", "n_transit", "n_heads", "rewarded_above"]
    assert list(agent.meta) == names
    columns = ["goal_row", "goal_col", "history", "step", "stride"]
    assert [*agent.decisions[0].labels] == columns


def test_it_acts_on_the_test_goals_in_their_room_and_is_known_by_its_file(
    run_file, tmp_path, tiny_config
):
    agent = hostile.acting(run_file)
    assert agent.title == "AD in Dark Room, 2 layers, 12 tokens"
    assert agent.facts == {"Checkpoint": f"{run_file} (the file asked for)"}
    assert agent.meta == {"checkpoint": str(run_file), "step": 5}
    told = agent.environment
    assert (told.goals, told.horizon, told.best) == (("(4, 4)", "(0, 3)"), 5, (2, 3))
    room = told.make(np.array([1, 0, 1]), [0, 1, 2])
    assert room.goals.tolist() == [[0, 3], [4, 4], [0, 3]]
    assert (room.grid_size, room.horizon, agent.identity["grid_size"]) == (5, 5, 5)
    model, path = sharp_model(tiny_config, 1), tmp_path / "o" / "ckpt-5.pt"
    other = hostile.acting(write_checkpoint(path, model, [[4, 4]], horizon=None))
    assert other.identity != agent.identity == hostile.acting(run_file).identity
    assert other.environment.horizon == 20  # where its config says nothing


def test_a_model_that_cannot_act_can_be_shown_and_one_without_history_is_not_compared(
    run_file, tiny_model
):
    write_checkpoint(run_file, tiny_model, [[4, 4]], env="darkkeytodoor")
    with pytest.raises(UserError, match="to act, got env 'darkkeytodoor' with 5; its attention ca"):
        hostile.acting(run_file)
    load_for_analysis(VisualizeConfig(checkpoint=str(run_file)), CPU)
    short = sharp_model(ModelConfig(n_transit=1, tf_n_embd=8, tf_n_inner=8, grid_size=5))
    write_checkpoint(run_file, short, [[4, 4]])
    with pytest.raises(UserError, match="its model reads no history: there is nothing to compress"):
        hostile.acting(run_file)
