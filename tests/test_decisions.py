"""The AD agent: which decisions it is looked at in, its passes, and its environment."""

import re

import numpy as np
import pytest
import torch
from conftest import ad_agent, make_histories, sharp_model, write_checkpoint
from hostile import acting
from hypothesis import given, settings
from hypothesis import strategies as st

from ad.agent import load_for_analysis
from ad.decisions import HistoryDecisions, Place, choose_decisions
from config import ModelConfig, VisualizeConfig
from dataset import CONTEXT, context_steps
from historylens.common.errors import UserError
from historylens.history import History

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


def test_filters_by_goal_history_and_steps_and_more_than_there_are_is_every_one_once():
    only = {"goals": [(0, 1), (1, 1)], "rows": [0, 3, 4], "bounds": (10, 19)}
    chosen = choose_decisions(histories_of(), 6, 20, seed=0, **only)
    assert set(chosen) == {(h, t, 1) for h in (3, 4) for t in range(10, 20)}
    chosen = choose_decisions(histories_of(streams=1, episodes=2), 5, n_samples=1000, seed=0)
    assert sorted(chosen) == [(history, step, 1) for history in range(3) for step in (5, 6, 7)]


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
    agent = acting(run_file)
    assert agent.title == "AD in Dark Room, 2 layers, 12 tokens"
    assert agent.facts == {"Checkpoint": f"{run_file} (the file asked for)"}
    assert agent.meta == {"checkpoint": str(run_file), "step": 5}
    told = agent.environment
    assert (told.goals, told.horizon, told.best) == (("(4, 4)", "(0, 3)"), 5, (2, 3))
    room = told.make(np.array([1, 0, 1]), [0, 1, 2])
    assert room.goals.tolist() == [[0, 3], [4, 4], [0, 3]]
    assert (room.grid_size, room.horizon, agent.identity["grid_size"]) == (5, 5, 5)
    model, path = sharp_model(tiny_config, 1), tmp_path / "o" / "ckpt-5.pt"
    other = acting(write_checkpoint(path, model, [[4, 4]], horizon=None))
    assert other.identity != agent.identity == acting(run_file).identity
    assert other.environment.horizon == 20  # where its config says nothing


def test_a_model_that_cannot_act_can_be_shown_and_one_without_history_is_not_compared(
    run_file, tiny_model
):
    write_checkpoint(run_file, tiny_model, [[4, 4]], env="darkkeytodoor")
    with pytest.raises(UserError, match="to act, got env 'darkkeytodoor' with 5; its attention ca"):
        acting(run_file)
    load_for_analysis(VisualizeConfig(checkpoint=str(run_file)), CPU)
    short = sharp_model(ModelConfig(n_transit=1, tf_n_embd=8, tf_n_inner=8, grid_size=5))
    write_checkpoint(run_file, short, [[4, 4]])
    with pytest.raises(UserError, match="its model reads no history: there is nothing to compress"):
        acting(run_file)
