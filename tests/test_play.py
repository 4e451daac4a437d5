"""An agent's own play: what it goes through, what it attends to, and how that changes."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import plain_model
import pytest
import torch
from agents import ModelAgent, Recorder
from conftest import sharp_model

from ad.darkroom import DarkRoom
from ad.evaluation import rollout_goals
from historylens.agent import Environment
from historylens.analysis import AnalysisConfig, Job
from historylens.analysis import play as module
from historylens.analysis.job import batches
from historylens.analysis.learning import learning_text, over_learning
from historylens.analysis.play import KINDS, Play, record
from historylens.analysis.results import measure
from historylens.common.errors import UserError
from historylens.common.files import write_atomically
from historylens.common.processes import ALONE
from historylens.metrics import Metrics

GOALS, HORIZON, N_STEPS = ((2, 3), (1, 2), (3, 2)), 5, 20
PLAYED = ("states", "actions", "rewards", "next_states", "episodes")
pytestmark = pytest.mark.filterwarnings("error")


class EndsEarly(DarkRoom):
    """An episode ends on the goal: that room begins anew, and the others go on."""

    def step(self, actions):
        reached, rewards, is_over = super().step(actions)
        self.states = np.where(rewards[:, None] > 0, self.grid_size // 2, reached)
        return reached, rewards, is_over | (rewards > 0)


def job_of(agent, room=DarkRoom, **settings):
    """A job of own play, four episodes long, and without an output folder."""
    cells, names, about = np.array(GOALS), tuple(map(str, GOALS)), {"named": ("goal", "of a test")}
    make, about["goal_states"] = lambda tasks, seeds: room(cells[tasks], 5, HORIZON), cells
    agent.environment = Environment(names, HORIZON, make, **about)
    config = AnalysisConfig(**{"play": True, "episodes": 4} | settings)
    layers = config.layers or [*range(len(agent.layers))]
    heads = [config.heads or [*range(agent.n_heads[layer])] for layer in layers]
    return Job(agent, config, ALONE, layers, heads, None)


def is_of(play, i, t, j):
    """At step `t` of rollout `i`: of which KINDS step `j` is."""
    ago, goal = play.episodes[i, t] - play.episodes[i, j], GOALS[i % len(GOALS)]
    same = tuple(play.states[i, j]) == tuple(play.states[i, t])
    return ago == 0, ago == 1, ago > 1, tuple(play.next_states[i, j]) == goal, same


def shares_of(play, i, t, weights):
    """What of the weights, one a step of the context, lies on each of KINDS."""
    steps = zip(range(t - len(weights), t), weights, strict=True)
    return sum((w * np.array(is_of(play, i, t, j)) for j, w in steps), np.zeros(5))


def reads_own_episode_and_rewards(history):
    """Weights `(B, n)`: three quarters on those, if any; hardly masked out: all others."""
    read = (history.episodes == history.query_episodes[:, None]) | (history.rewards > 0.5)
    return (0.75 * read / read.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-9)


@pytest.mark.parametrize("room", [DarkRoom, EndsEarly])
def test_what_a_planted_model_reads_is_found_at_every_step(room):
    agent = Recorder(7, lambda h: torch.zeros(h.size, 5), reads_own_episode_and_rewards)
    play = record(job_of(agent, room, rollouts=3, seed=1))
    ends = (room is EndsEarly) & (play.rewards > 0)
    ends |= np.arange(N_STEPS) % HORIZON == HORIZON - 1
    np.testing.assert_array_equal(np.diff(play.episodes), ends[:, :-1])
    shares = np.zeros((9, N_STEPS, len(KINDS)))
    for i, t in np.ndindex(9, N_STEPS):
        kinds = [is_of(play, i, t, j) for j in range(max(0, t - 7), t)]
        read = [own_episode or rewarded for own_episode, _, _, rewarded, _ in kinds]
        shares[i, t] = shares_of(play, i, t, [0.75 * x / max(1, sum(read)) for x in read])
        even = shares_of(play, i, t, [1 / (len(read) + 1)] * len(read))
        assert play.even[i, t] == pytest.approx(even, abs=1e-6)
    np.testing.assert_allclose(play.shares[:, :, 0], shares, atol=1e-6)


@pytest.fixture(scope="module")
def real(tiny_config):
    """A tiny model's own play, and one of its rollouts followed."""
    return record(job_of(ModelAgent(sharp_model(tiny_config)), trajectory=4))


@pytest.mark.parametrize("settings", [{}, {"layers": [1], "heads": [1]}], ids=str)
def test_attention_at_random_steps_is_that_of_the_plain_model(tiny_config, settings):
    model = sharp_model(tiny_config)
    play = record(job_of(ModelAgent(model), trajectory=4, **settings))
    tensors = {name: w.numpy().astype(np.float64) for name, w in model.state_dict().items()}
    layers, heads = settings.get("layers", [0, 1]), settings.get("heads", [0, 1])
    some = np.random.default_rng(5).integers((6, N_STEPS), size=(8, 2)).tolist()
    for i, t in [(4, 0), (4, 1), (4, 11), (4, 19), *some]:
        steps, query = range(max(0, t - 11), t), play.states[i, t].tolist()
        read = [[getattr(play, name)[i, j].tolist() for name in PLAYED[:4]] for j in steps]
        rows = plain_model.run_model(tensors, vars(tiny_config), read, query)[1]
        rows = rows[layers][:, heads].mean(1)  # (L, H, n + 1) -> (L, n + 1)
        shares = [shares_of(play, i, t, row[:-1]) for row in rows]
        np.testing.assert_allclose(play.shares[i, t], shares, atol=1e-6)
        if i == 4:  # the latest transition beside the query; NaN where there is no history yet
            wide = np.full((len(layers), 12), np.nan)
            wide[:, 11 - len(read) :] = rows
            np.testing.assert_allclose(play.rows[t], wide, atol=1e-6)


def test_only_what_is_drawn_has_maps_and_their_last_row_is_the_querys(real, tiny_config):
    job = job_of(ModelAgent(sharp_model(tiny_config)), layers=[1])
    job.agent.decisions = [one for one in real.choose(120, seed=0) if one.n == 11]
    drawn, rest = (batch.attention for batch in batches(job, [([0, 1], [0, 1]), ([2], [])]))
    assert list(drawn) == list(rest) == [1]
    assert drawn[1].maps.shape == (2, 2, 12, 12)
    torch.testing.assert_close(drawn[1].maps[:, :, -1], drawn[1].query_rows)
    assert rest[1].maps is rest[1].received is None


@pytest.mark.parametrize("run", [record, lambda job: [*batches(job, [([0], [])])]])
def test_attention_that_cannot_be_captured_is_said_as_a_mistake(real, run):
    agent = Recorder()
    job = job_of(agent)
    agent.decisions, agent.forward = real.choose(1, 0), agent.logits  # nothing attends
    with pytest.raises(UserError, match="attention cannot be captured"):
        run(job)


def test_it_plays_what_acting_does_whatever_is_asked_beside(tiny_config, monkeypatch):
    model, settings = sharp_model(tiny_config), {"seed": 3, "trajectory": 4}
    play = record(job_of(ModelAgent(model), **settings))
    acted = rollout_goals(model, np.array(GOALS * 2), 4, 3, HORIZON)
    assert acted.sum() > 0
    np.testing.assert_array_equal(play.rewards.reshape(6, 4, HORIZON).sum(2), acted)
    monkeypatch.setattr(module, "MAX_ROOMS", 2)  # that step together
    settings |= {"rollouts": 3, "layers": [1], "num_samples": 3}
    other = record(job_of(ModelAgent(model), **settings))
    for name in PLAYED:
        np.testing.assert_array_equal(getattr(other, name)[:6], getattr(play, name))
    np.testing.assert_allclose(other.shares[:6, :, 0], play.shares[:, :, 1], atol=1e-6)
    np.testing.assert_allclose(other.rows[:, 0], play.rows[:, 1], atol=1e-6)


def places_of(play, n_samples, seed):
    return [(one.labels["rollout"], one.labels["step"]) for one in play.choose(n_samples, seed)]


def test_decisions_are_spread_over_tasks_rollouts_and_stages(real):
    assert sorted(places_of(real, 120, 0)) == [*np.ndindex(6, N_STEPS)]
    for seed in range(5):
        rollouts, steps = zip(*places_of(real, 5, seed), strict=True)
        assert len(set(rollouts)) == 5
        assert max(np.bincount(np.array(rollouts) % 3)) == 2
        assert sorted(step // 4 for step in steps) == [0, 1, 2, 3, 4]
        assert {*np.bincount([i for i, _ in {*places_of(real, 60, seed)}])} == {10}
    assert places_of(real, 5, 1) == places_of(real, 5, 1) != places_of(real, 5, 2)


def test_a_decision_is_a_step_with_what_could_be_read_and_is_measured_so(real, tiny_config):
    job = job_of(ModelAgent(sharp_model(tiny_config)), num_figures=0)
    job.agent.decisions = decisions = real.choose(1000, seed=0)
    metrics = Metrics(120, job.layers, job.heads)
    measure(job, metrics)
    assert np.isfinite(metrics.values).all()
    mass = metrics.of("mass_rewarded")
    for place, ((i, t), one) in enumerate(zip(places_of(real, 1000, 0), decisions, strict=True)):
        assert one.n == metrics.n_context[place] == min(t, 11)
        assert mass[:, place] == pytest.approx(real.shares[i, t, :, 3], abs=1e-6)
        for name in PLAYED:
            expected = getattr(real, name)[i, max(0, t - 11) : t]
            np.testing.assert_array_equal(getattr(one, name), expected)
        goal, episode = GOALS[i % 3], t // HORIZON
        assert (*one.query_state, *np.ravel(one.goal)) == (*real.states[i, t], *goal)
        assert (one.task, one.query_episode) == (i % 3, episode)
        title = f"own play: goal {goal}, rollout {i}, episode {episode + 1} of 4, step {t}"
        labels = {"task": str(goal), "rollout": i, "episode": episode + 1, "step": t}
        assert (one.title, one.labels) == (title, labels)


def test_what_happens_by_chance_in_a_rollout_depends_on_its_number_and_the_seed():
    job = job_of(Recorder(), rollouts=2, seed=4)
    make = mock.Mock(side_effect=job.agent.environment.make)
    job.agent.environment = replace(job.agent.environment, make=make)
    record(job)
    assert make.call_args.args[1] == [4, 5, 6, 7, 8, 9]


def play_of(rewards, episodes=None, above=0.0):
    """A play of rewards `(R, N)`, an episode a step unless `episodes` say more."""
    rewards = np.array(rewards, dtype=np.float32)
    shape, steps = rewards.shape, np.broadcast_to(np.arange(rewards.shape[1]), rewards.shape)
    none, episodes = np.zeros((*shape, 2)), steps if episodes is None else np.array(episodes)
    played = np.zeros(len(rewards), int), none, steps, rewards, none, episodes
    attention = np.zeros((*shape, 2, len(KINDS))), np.zeros((*shape, len(KINDS)))
    return Play(SimpleNamespace(best=(2.0, 3.0)), 9, above, *played, *attention, None)


def told(play):
    """What is found of two layers, and the text, which holds no gaps."""
    learning = over_learning(play, (2, 6), seed=0)
    text = learning_text(learning)
    assert not any(word in text for word in ("nan", "None", "EPISODEs", "inf"))
    assert max(map(len, text.splitlines())) <= 100
    return learning, " ".join(text.split())


def test_curves_are_means_over_rollouts_of_means_over_the_steps_of_an_episode(tmp_path):
    """Episodes that end early: three in one rollout, two in the other."""
    play = play_of([[0, 1, 1, 0, 5, 7], [0, 0, 2, 2, 2, 2]], [[0, 0, 0, 1, 1, 2], [0] + [1] * 5])
    play.shares[:, :, 1, 3] = [[0.1, 0.2, 0.3, 0.4, 0.6, 0.8], [0.4, 0, 0.1, 0.2, 0.3, 0.4]]
    play.even[:, :, 3] = play.shares[:, :, 1, 3] / 2
    learning, _ = told(play)
    write_atomically(tmp_path / "learning.json", learning)  # refuses NaN
    assert learning["first_reward"]["episode"].tolist() == [1, 2]
    by_hand = {  # where both are there, they are the ends of the interval
        "by_episode": ([1, 2, 3], [2, 2, 1], [1, 6.5, 7], [0.3, 0.35, 0.8], [0.2, 0.2, None]),
        "since_first_reward": (
            [-1, 0, 1, 2], [1, 2, 1, 1], [0, 5, 5, 7], [0.4, 0.2, 0.5, 0.8], [None, 0.2, None, None]
        ),
    }  # fmt: skip
    for name, (episode, rollouts, reward, mean, low) in by_hand.items():
        curves, share = learning[name], learning[name]["layers"][1]["shares"]["rewarded"]
        assert [curves[x].tolist() for x in ("episode", "rollouts")] == [episode, rollouts]
        assert curves["reward"]["mean"] == pytest.approx(reward)
        assert (share["mean"], share["low"]) == (pytest.approx(mean), pytest.approx(low))
        assert curves["even"]["rewarded"] == pytest.approx(np.divide(mean, 2))


def test_rollouts_are_aligned_at_their_first_reward_but_those_that_earn_none():
    learning, text = told(play_of([[1, 2, 3, 4], [0, 0, 5, 6], [0, 0, 0, 0]]))
    since = learning["since_first_reward"]
    assert since["episode"].tolist() == [-2, -1, 0, 1, 2, 3]
    assert since["reward"]["mean"] == [0, 0, 3, 4, 3, 4]
    assert "The first reward comes in episode 2 (median); 1 of 3 rollouts earn none." in text
    assert "0.3 in the first, 3.3 [0.0, 6.0] in the last of 2.5 possible." in text
    few = told(play_of([[1, 1]] * 7 + [[0, 1]] * 2))[0]["since_first_reward"]
    assert few["episode"].tolist() == [0, 1]  # less than a quarter of 9 have one before
    learning, text = told(play_of([[1, 2], [0, 0]], above=1))
    assert learning["first_reward"]["episode"].tolist() == [2]
    said = (
        "The first reward above 1 comes in episode 2 (median); 1 of 2 rollouts earn none above 1."
    )
    assert said in text


def test_what_changed_most_is_told_beside_what_uniform_attention_does():
    play = play_of(np.zeros((2, 14)), [range(14), [0, *range(13)]])  # five at each end count
    play.shares[0, :, 1, 3] = [0.3] + [0.05] * 4 + [0.9] * 4 + [0.4] * 5
    play.shares[1, :, 1, 3] = [0.3] * 2 + [0.05] * 4 + [0.9] * 3 + [0.4] + [0.65] * 4
    play.even[:, :, 3] = [0.1] * 7 + [0.2] * 7
    learning, text = told(play)
    change = learning["changes"]["over episodes"]
    assert (change["layer"], change["kind"], change["rollouts"]) == (6, "rewarded", 2)
    assert change["interval"] == pytest.approx([0.2, 0.4])
    assert (
        "From the first episodes to the last: most in layer 6, whose attention on rewarded "
        "transitions goes from 10% to 50%, evenly 10% to 20%: +30% beyond that [+20%, +40%], over "
        "2 rollouts."
    ) in text


def test_what_changed_at_the_first_reward_is_within_five_episodes_of_it_on_each_side():
    play = play_of(np.arange(14) == np.array([[7], [6], [99]]))
    for i, at in enumerate((7, 6)):
        play.shares[i, :, 0, 4], play.shares[i, at - 5 : at, 0, 4] = 0.9, 0.2
        play.shares[i, at + 1 : at + 6, 0, 4] = 0.4 + 0.2 * i
    learning, text = told(play)
    change = learning["changes"]["at the first reward"]
    assert (change["layer"], change["kind"], change["rollouts"]) == (2, "same state", 2)
    assert "evenly 0% to 0%: +30% beyond that [+20%, +40%], over 2 rollouts." in text


@pytest.mark.parametrize(("rewards", "episodes", "known", "said"), [  # which changes are known
    ([[0, 0]] * 2, None, (True, False), "2 of 2 rollouts earn none."),
    ([[0, 1]] * 2, [[0, 0]] * 2, (False, False), "OVER 1 EPISODE OF ITS OWN PLAY"),
    ([[0, 1, 2]], None, (False, False), "0.0 in the first, 2.0 in the last of"),
    ([[1, 1]] * 2, None, (True, False), "reward comes in episode 1 (median)."),  # at once
    ([[0, 1, 0]] * 2, [[0, 0, 0], [0, 1, 2]], (False, False), "episode 1.5 (median)"),  # early ends
])  # fmt: skip
def test_what_is_lacking_is_said(rewards, episodes, known, said):
    learning, text = told(play_of(rewards, episodes))
    assert said in text
    assert (learning["since_first_reward"] is None) == (not np.any(rewards))
    starts = "From the first episodes to the last: ", "Once the first reward is found: "
    for is_known, start, change in zip(known, starts, learning["changes"].values(), strict=True):
        assert (change is not None) == is_known
        assert start + ("no layer changes clearly" if is_known else "not known, ") in text
