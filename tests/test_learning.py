"""How attention changes over a play: means, intervals, alignment, what changed most, in words."""

from types import SimpleNamespace

import numpy as np
import pytest

from historylens.analysis.learning import learning_text, over_learning
from historylens.analysis.play import KINDS, Play
from historylens.common.files import write_atomically

pytestmark = pytest.mark.filterwarnings("error")


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
        "transitions goes from 10% to 50%, evenly 10% to 20%: +30% beyond that [+20%, +40%]."
    ) in text


def test_what_changed_at_the_first_reward_is_within_five_episodes_of_it_on_each_side():
    play = play_of(np.arange(14) == np.array([[7], [6], [99]]))
    for i, at in enumerate((7, 6)):
        play.shares[i, :, 0, 4], play.shares[i, at - 5 : at, 0, 4] = 0.9, 0.2
        play.shares[i, at + 1 : at + 6, 0, 4] = 0.4 + 0.2 * i
    learning, text = told(play)
    change = learning["changes"]["at the first reward"]
    assert (change["layer"], change["kind"], change["rollouts"]) == (2, "same state", 2)
    assert "state goes from 20% to 50%, evenly 0% to 0%: +30% beyond that [+20%, +40%]." in text


LACKING = {  # rewards, episodes, which changes are known, what is said
    "no reward": ([[0, 0]] * 2, None, (True, False), "2 of 2 rollouts earn none."),
    "one episode": ([[0, 1]] * 2, [[0, 0]] * 2, (False, False), "OVER 1 EPISODE OF ITS OWN PLAY"),
    "one rollout": ([[0, 1, 2]], None, (False, False), "0.0 in the first, 2.0 in the last of"),
    "at once": ([[1, 1]] * 2, None, (True, False), "reward comes in episode 1 (median)."),
    "ends early": ([[0, 1, 0]] * 2, [[0, 0, 0], [0, 1, 2]], (False, False), "episode 1.5 (med"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_is_lacking_is_said(name):
    rewards, episodes, known, said = LACKING[name]
    learning, text = told(play_of(rewards, episodes))
    assert said in text
    assert (learning["since_first_reward"] is None) == (not np.any(rewards))
    starts = "From the first episodes to the last: ", "Once the first reward is found: "
    for is_known, start, change in zip(known, starts, learning["changes"].values(), strict=True):
        assert (change is not None) == is_known
        assert start + ("no layer changes clearly" if is_known else "not known, ") in text
