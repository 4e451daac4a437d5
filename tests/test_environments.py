"""Environments of Gymnasium that begin anew each in its way: what is stored, what is earned."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compare_compression import main
from historylens.adapter.file import Adapter
from historylens.adapter.given import GymRooms
from historylens.agent import rollout
from historylens.common.errors import UserError

gymnasium = pytest.importorskip("gymnasium")
N_ROOMS, SEED = 3, 7
ADAPTER = """
import gymnasium, numpy as np, torch
from torch import nn
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from historylens import Decision

GOALS, HORIZON = ("pole",), 25
KIND, MODE, LIMIT = SyncVectorEnv, "SAME_STEP", 500


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, history):  # balances as soon as it has some history, else pushes to the left
        x = torch.cat([history.states, history.query_states[:, None]], 1)
        leans = history.query_states[:, 2] + 0.5 * history.query_states[:, 3] > 0
        right = leans if history.n else torch.zeros_like(leans)
        return 0 * self.layer(x)[:, -1, :2] + 99.0 * torch.stack([~right, right], 1)


def load():
    return Model()


def samples(n, seed):
    drawn = np.random.default_rng(seed).normal(size=(n, 31, 4)).astype(np.float32) / 20
    return [Decision(one[:-1], np.arange(30) % 2, np.ones(30), one[-1]) for one in drawn]


def act(model, history):
    return model(history)


class OldNames(VectorWrapper):  # as before Gymnasium 1.0
    metadata = {}

    def step(self, actions):
        *given, infos = self.env.step(actions)
        names = {"final_obs": "final_observation", "_final_obs": "_final_observation"}
        return *given, {names.get(name, name): value for name, value in infos.items()}


def make_env(goals):
    one = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=LIMIT)] * len(goals)
    if KIND == "alone":
        return gymnasium.make_vec("CartPole-v1", len(goals), "vector_entry_point")
    if KIND == "old":
        return OldNames(SyncVectorEnv(one, autoreset_mode=AutoresetMode.SAME_STEP))
    return KIND(one, autoreset_mode=AutoresetMode[MODE])
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def written(changes=(), kind="SyncVectorEnv", mode="SAME_STEP", limit=500):
    told = ('SyncVectorEnv, "SAME_STEP", 500', f"{kind}, {mode!r}, {limit}")
    text = ADAPTER
    for old, new in (told, *changes):
        assert old in text
        text = text.replace(old, new)
    Path("poles.py").write_text(text)
    return "poles.py"


OWN = ("KIND, MODE", "class Own(SyncVectorEnv):\n{}\n\n\nKIND, MODE")  # of which a line is changed
CLOSED = """
    def close(self, **options):
        print("closed", options)
        super().close(**options)"""
TENSORS = """
    def step(self, actions):
        *given, infos = super().step(actions)
        return *map(torch.as_tensor, given), infos"""
NOISY = """
    def step(self, actions):
        states, rewards, *more = super().step(actions)
        return states, rewards + np.random.random(len(rewards)), *more"""


def own(step):
    return {"changes": [(OWN[0], OWN[1].format(step))], "kind": "Own"}


def played(horizon, n_steps, **kind):
    """Rewards, ends, and the history of rooms in which actions are drawn, more often right."""
    state = np.zeros(4, dtype=np.float32)
    rooms = GymRooms(Adapter(written(**kind)), state, horizon, np.zeros(N_ROOMS, dtype=int), [SEED])
    stored, noises = [], [np.random.default_rng(room) for room in range(N_ROOMS)]

    def act(buffer, query_states):
        stored[:] = [buffer]
        return torch.tensor([[0.0, 1.5]]).expand(N_ROOMS, 2)

    policy = SimpleNamespace(device="cpu", act=act)
    rewards, ends = rollout(rooms, policy, n_steps, noises)
    return rewards, ends, stored[0].history(torch.zeros(N_ROOMS, 4))


def plain_loop(history, horizon, limit, room):
    """One environment alone, a reset where its episode ends or after the horizon's steps."""
    env = gymnasium.make("CartPole-v1", max_episode_steps=limit)
    (state, _), episode = env.reset(seed=SEED + room), 0
    for t, action in enumerate(history.actions[room].tolist()):
        reached, reward, terminated, truncated, _ = env.step(action)
        is_over = terminated or truncated or (t + 1) % horizon == 0
        yield state, reward, reached, episode, is_over
        episode += is_over
        state = env.reset()[0] if is_over else reached


@pytest.mark.parametrize(("horizon", "limit", "kind"), [
    *((*sizes, {"mode": mode}) for mode in ("NEXT_STEP", "SAME_STEP", "DISABLED")
      for sizes in ((25, 500), (6, 6), (10, 7), (25, 11))),
    (25, 500, {"kind": "AsyncVectorEnv", "mode": "NEXT_STEP"}),
    (25, 500, {"kind": '"old"'}),  # older names of the last state
])  # fmt: skip
def test_what_is_stored_is_what_a_single_environment_goes_through(horizon, limit, kind):
    rewards, ends, history = played(horizon, 4 * horizon + 3, limit=limit, **kind)
    for room in range(N_ROOMS):
        plain = zip(*plain_loop(history, horizon, limit, room), strict=True)
        states, earned, reached, episodes, is_over = map(np.array, plain)
        np.testing.assert_array_equal(history.states[room], states)
        np.testing.assert_array_equal(history.next_states[room], reached)
        np.testing.assert_array_equal(history.rewards[room], earned)
        np.testing.assert_array_equal(rewards[room], earned)
        np.testing.assert_array_equal(history.episodes[room], episodes)
        np.testing.assert_array_equal(ends[room], is_over)
    assert ends.sum() > 4 * N_ROOMS or horizon < 10  # some end early


def test_environments_that_only_begin_anew_together_may_not_end_alone():
    with pytest.raises(UserError, match=r"poles\.py: make_env\(\): an environment ended alone"):
        played(25, 100, kind='"alone"')
    _, ends, _ = played(6, 12, kind='"alone"')
    assert ends.sum() == 2 * N_ROOMS


@pytest.mark.parametrize(("gives", "words"), [
    ("*given, {}", r"expected infos\['final_obs'\] of every env.*got nothing"),
    ("*given, {'final_obs': [[1.0]] * len(given[1])}", r"final_obs'\]: expected 4 numbers"),
    ("*given[:2], [True], [True], infos", r"expected ends of shape \(3,\)"),
])  # fmt: skip
def test_a_last_state_that_is_not_given_is_one_line(gives, words):
    old = "*given, {names.get(name, name): value for name, value in infos.items()}"
    changes = [("metadata = {}", "metadata = {'autoreset_mode': 'Same_Step'}"), (old, gives)]
    with pytest.raises(UserError, match=rf"\Apoles\.py: (?=.*{words})"):
        played(25, 60, kind='"old"', changes=changes)


def test_environments_are_closed_and_what_they_give_may_be_tensors(capsys):
    plain = played(25, 30)
    for each in (CLOSED, TENSORS):
        for one, same in zip(played(25, 30, **own(each))[:2], plain[:2], strict=True):
            np.testing.assert_array_equal(one, same)
    assert capsys.readouterr().out.startswith("closed {}")  # and not told to end processes


def compared(capsys, *changes, out="figs/compression", **kind):
    run = ["--seeds=2", "--episodes=3", "--budgets=5", "--strategies=recent", "--confirm=0"]
    main(["--adapter", written(changes, **kind), "--out", out, *run])
    with Path(out, "results.csv").open() as file:
        earned = {row["strategy"]: float(row["return"]) for row in csv.DictReader(file)}
    return earned, " ".join(capsys.readouterr().out.split())


def test_arms_are_told_apart_where_every_step_pays(capsys):
    """Balancing pays 25 in 25 steps; pushing to the left falls after 8 to 10 of them, so twice."""
    earned, said = compared(capsys)
    assert earned["full"] == pytest.approx(25, abs=3)
    assert earned["empty"] == pytest.approx(25 / 3)
    counted = "a return is the reward of 25 steps divided by the episodes in them, the last one cut"
    assert said.count(counted) == 1
    assert "ended before 25 steps" in Path("figs/compression/results.json").read_text()
    assert "With the control shuffled-rewards" not in said  # of rewards that are all equal
    page = Path("figs/compression/index.html").read_bytes()
    again, said = compared(capsys)  # taken up: known from the start
    assert again == earned
    assert Path("figs/compression/index.html").read_bytes() == page
    assert said.index("Episodes: ") < said.index("COMPRESSED AGAINST")
    assert said.count(counted) == 2


def test_where_nothing_ends_early_nothing_is_said_of_it(capsys):
    earned, said = compared(capsys, ('HORIZON = ("pole",), 25', 'HORIZON = ("pole",), 6'))
    assert set(earned.values()) == {6.0}
    assert "ended before" not in said
    assert "ended_early" not in Path("figs/compression/results.json").read_text()


def test_what_is_drawn_from_generators_that_all_share_is_the_same_in_each_run(capsys):
    noisy = own(NOISY)
    one, other = (compared(capsys, *noisy["changes"], out=out, kind="Own")[0] for out in "ab")
    assert one == other
    assert len({value % 1 for value in one.values()}) > 1


def test_results_know_of_all_that_an_adapter_imports_but_of_no_library():
    path, physics = Path("tools/poles.py"), Path("physics/gravity.py")
    for one in (path, physics):
        one.parent.mkdir()
    physics.write_text("G = 9.8")
    path.write_text(
        Path(written()).read_text() + "\nfrom physics.gravity import G\nimport colorsys"
    )
    assert Adapter(path).files == sorted([path.resolve(), physics.resolve()])
