"""The room as a map: attention on the cells in which transitions ended, in numbers and as seen."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from attention_rows import uniform
from conftest import ad_agent
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from historylens.adapter.agent import load
from historylens.analysis.room import RoomMap
from historylens.common.errors import UserError
from historylens.common.files import write_atomically
from historylens.history import Decision
from historylens.pictures import roommap
from historylens.pictures.page import Page
from historylens.pictures.roommap import room_map

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def agent_of(*room):
    return SimpleNamespace(room=room, position=lambda states: states[..., :2])


def walk(cells, episodes=None, rewards=None, **more):
    """A decision in the last of some cells, after the steps between them."""
    cells, n = np.array(cells), len(cells) - 1
    rewards = np.zeros(n) if rewards is None else np.array(rewards)
    path = {"states": cells[:-1], "next_states": cells[1:], "query_state": cells[-1]}
    return Decision(
        actions=np.zeros(n, dtype=int), rewards=rewards, episodes=episodes, **path, **more
    )


def even_map(decision, agent, n_panels=1):
    """The map of a decision whose attention is uniform, the same in every panel."""
    even = uniform(decision.n)
    return RoomMap.of(agent, decision, np.tile(even, (n_panels, 1)), even)


@settings(max_examples=15)
@pytest.mark.filterwarnings("ignore:invalid value")  # 0 / 0, where nobody was
@given(n=st.integers(0, 30), room=st.tuples(*[st.integers(1, 6)] * 2), seed=st.integers(0, 99))
def test_numbers_are_those_of_a_plain_loop(n, room, seed):
    rng, n_panels = np.random.default_rng(seed), 1 + seed % 4
    cells = rng.integers(room, size=(n + 1, 2)).astype(np.int8)
    episodes = np.sort(rng.integers(3, size=n))
    above, now = 0.5, int(episodes.max(initial=0)) + int(rng.integers(2))
    decision = walk(cells, episodes, rng.random(n), query_episode=now, rewarded_above=above)
    rows, even = rng.dirichlet(np.ones(n + 1), size=n_panels), rng.dirichlet(np.ones(n + 1))
    found = RoomMap.of(agent_of(*room), decision, rows, even)
    visits, rewarded, uniformly = np.zeros((3, *room))
    attention = np.zeros((n_panels, *room))
    for t, (row, column) in enumerate(cells[1:]):
        visits[row, column] += 1
        rewarded[row, column] += decision.rewards[t] > above
        uniformly[row, column] += even[t]
        attention[:, row, column] += rows[:, t]
    numbers, seen = found.numbers(), visits > 0
    plain = {"visits": visits, "rewarded": rewarded, "even": uniformly, "attention": attention}
    for name, values in plain.items():
        np.testing.assert_allclose(numbers[name], values[..., seen], rtol=1e-5)
    np.testing.assert_allclose(numbers["ratio"], (attention / uniformly)[:, seen], rtol=1e-5)
    assert numbers["cells"] == np.argwhere(seen).tolist()
    assert (np.isnan(found.ratio) == ~seen).all()
    path = [cells[t].tolist() for t in range(n) if episodes[t] == now] + [cells[n].tolist()]
    assert found.path.tolist() == numbers["path"] == path
    assert numbers["room"] == list(room)


@pytest.mark.parametrize(("query", "episode", "path"), [
    ((1, 2), None, [[0, 1], [1, 1], [1, 2]]),  # where the latest transition led
    ((0, 0), None, [[0, 0]]),  # elsewhere: a new episode has begun
    ((1, 2), 6, [[1, 2]]),  # said to have begun, where the other one ended
    ((0, 0), 5, [[0, 1], [1, 1], [0, 0]]),
])  # fmt: skip
def test_the_path_is_that_of_the_episode_of_the_decision(query, episode, path):
    decision = walk([(2, 2), (0, 1), (1, 1), (1, 2)], [4, 5, 5], goal=[2, 0])
    decision = replace(decision, query_state=np.array(query), query_episode=episode)
    room = even_map(decision, agent_of(3, 3))
    assert (room.path.tolist(), room.goals.tolist()) == (path, [[2, 0]])


def test_what_the_query_cannot_read_has_no_ratio_and_json_can_hold_that(tmp_path):
    even = np.array([0, 0.5, 0.5])
    room = RoomMap.of(agent_of(1, 3), walk([(0, 0), (0, 1), (0, 2)]), even[None], even)
    assert room.numbers()["ratio"] == [[None, 1.0]]
    write_atomically(tmp_path / "a.json", room.numbers())


def test_a_position_outside_the_room_is_told():
    words = r"position\(\): expected a row in 0\.\.2 and a column in 0\.\.1, whole numbers, got \["
    for cell in ((3, 0), (0, -1), (0.5, 0), (0, np.nan)):
        with pytest.raises(UserError, match=words):
            even_map(walk([(0.0, 0.0), cell, (1.0, 1.0)]), agent_of(3, 2))


def drawn(path, room, n_panels=1, dpi=100, **more):
    """The maps of a picture, `(rows, columns, 3)` pixels each, its texts, and the lines drawn."""
    names = [f"panel {i}" for i in range(n_panels)]
    room_map(path, room, names, "a", "b", dpi=dpi, **more)  # what all share is drawn once
    with (
        mock.patch.object(Page, "paste", autospec=True, side_effect=Page.paste) as paste,
        mock.patch.object(Page, "text", autospec=True, side_effect=Page.text) as text,
        mock.patch.object(Page, "lines", autospec=True, side_effect=Page.lines) as lines,
    ):
        room_map(path, room, names, "In the room", "one", dpi=dpi, **more)
    pixels, maps = np.asarray(Image.open(path).convert("RGB")), []
    for call in paste.call_args_list[:n_panels]:
        _, left, top, colours = call.args
        row, column = round(top * dpi / 100), round(left * dpi / 100)
        maps.append(pixels[row : row + len(colours), column : column + colours.shape[1]])
        assert maps[-1].shape == colours.shape  # it lies on the page
    return maps, [call.args[3] for call in text.call_args_list], lines.call_args_list


def colour(image, room, cell):
    """Of a cell, near its lower left corner, where no mark is."""
    side = len(image) // len(room.even)
    row, column = (int((x + part) * side) for x, part in zip(cell, (0.86, 0.14), strict=True))
    return image[row, column].astype(int)


BRIGHT, GREY, DARK = (roommap.SHADES[i].astype(int) for i in (255, 128, 0))


def test_attention_on_one_cell_makes_that_cell_bright_and_nothing_else(tmp_path):
    path = "22 23 33 43 33 34 33 23 13 12 00 01 02 11 21 44 42 41 40 31 32"
    cells = [(int(row), int(column)) for row, column in path.split()]
    decision, n = walk(cells * 2), 2 * len(cells) - 1
    planted = (decision.next_states == (0, 1)).all(axis=1) / 2
    rows = np.stack([np.append(planted, 0), uniform(n)])
    room = RoomMap.of(agent_of(5, 5), decision, rows, uniform(n))
    numbers = room.numbers()
    ratios = dict(zip(map(tuple, numbers["cells"]), numbers["ratio"][0], strict=True))
    assert ratios.pop((0, 1)) == pytest.approx((n + 1) / 2, rel=1e-5)
    assert set(ratios.values()) == {0}
    (planted, even), *_ = drawn(tmp_path / "a.png", room, 2)
    for cell in cells:
        expected = BRIGHT if cell == (0, 1) else DARK
        assert np.abs(colour(planted, room, cell) - expected).max() <= 2
        assert np.abs(colour(even, room, cell) - GREY).max() <= 2
    for row, column in set(np.ndindex(5, 5)) - set(cells):  # white, with strokes across
        side = len(planted) // 5
        part = planted[row * side + 3 : (row + 1) * side - 3, column * side + 3 :][:, : side - 6]
        assert 0 < (part.min(axis=2) < 250).mean() < 0.4
        assert part.min() > 160


@pytest.mark.parametrize(("n", "room", "n_panels"), [
    (0, (2, 2), 4), (1, (1, 9), 3), (1, (2, 2), 24), (2, (9, 1), 2), (1, (60, 80), 1),
])  # fmt: skip
def test_any_room_any_number_of_panels_and_hardly_a_transition(tmp_path, n, room, n_panels):
    decision = walk([(0, 0)] * (n + 1), goal=np.subtract(room, 1))  # who stays in place
    own = even_map(decision, agent_of(*room), n_panels)
    maps, texts, _ = drawn(tmp_path / "a.png", own, n_panels, dpi=60)
    assert len(maps) == n_panels
    assert max(Image.open(tmp_path / "a.png").size) < 1800
    assert ("one · no history yet" in texts) == (n == 0)
    assert [texts.count(mark) for mark in ("↻", "↻2")] == [n_panels * (n == k) for k in (1, 2)]


def test_the_path_the_agent_the_goal_and_rewards_are_marked_where_they_are(tmp_path):
    cells = [(0, 0), (0, 1), (0, 1), (1, 1), (2, 1)]
    room = even_map(walk(cells, rewards=[0, 0, 1, 0], goal=(2, 2)), agent_of(3, 3))
    (image,), texts, lines = drawn(tmp_path / "a.png", room)
    assert texts.count("↻") == 1
    side, red = len(image) // 3, np.array(list(bytes.fromhex(roommap.REWARD[1:])))

    def is_marked(row, column):
        part = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
        return (np.abs(part.astype(int) - red).max(axis=2) < 12).sum() > side

    marked = [cell for cell in np.ndindex(3, 3) if is_marked(*cell)]
    assert marked == [(1, 1), (2, 2)]  # the reward, and the goal
    middle = image[int(2.44 * side), int(1.44 * side)]  # of the agent's dot
    assert np.abs(middle.astype(int) - 0x22).max() < 12
    shafts = [path for call in lines for path in call.args[1] if len(path) == 2]
    length = {round(float(np.hypot(*(b - a))) / side, 2) for a, b in map(np.asarray, shafts)}
    assert 0.6 in length  # of a step to the next cell; none has no length
    assert 0.0 not in length


def test_heads_stand_in_rows_of_layers(tmp_path):
    room = even_map(walk([(0, 0), (0, 1)]), agent_of(2, 2), n_panels=6)
    with mock.patch.object(Page, "paste", autospec=True) as paste:
        room_map(tmp_path / "a.png", room, list("abcdef"), "a", "b", across=2, dpi=50)
    lefts, tops = zip(*[call.args[1:3] for call in paste.call_args_list[-6:]], strict=True)
    assert lefts == lefts[:2] * 3
    assert lefts[0] < lefts[1]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4] == tops[5]


def test_decisions_of_the_ad_model_know_room_goal_and_episode(tiny_model, tiny_histories):
    agent = ad_agent(tiny_model, tiny_histories, [(2, 17), (0, 15)])  # five steps an episode
    assert agent.room == (5, 5)
    assert [one.query_episode for one in agent.decisions] == [3, 3]
    within, begun = (even_map(one, agent) for one in agent.decisions)
    assert within.path.tolist() == tiny_histories.states[2, 15:18].tolist()
    assert begun.path.tolist() == [[2, 2]]
    assert (within.goals.tolist(), begun.goals.tolist()) == ([[4, 3]], [[0, 1]])
    n = agent.decisions[0].n
    assert within.rewarded.sum() == tiny_histories.rewards[2, 17 - n : 17].sum()


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def changed(old, new):
        text = (EXAMPLES / "sar_mha.py").read_text()
        assert old in text
        Path("mine.py").write_text(text.replace(old, new))
        return load("mine.py", 4, 0, CPU)

    return changed


POSITION, ABOUT = "return 0, int(state[0])", '"task": task}'
SAMPLED = "def samples(", "ROOM = {}\n\n\ndef samples("


def test_an_adapter_says_where_states_lie(adapter):
    agent = adapter(ABOUT, '"task": task, "query_episode": 3, "goal": 8 * task}')
    decision = agent.decisions[1]
    assert agent.room == (1, 9)
    assert (decision.query_episode, decision.goal.tolist()) == (3, [[8]])
    for states in (decision.states, decision.states[:0]):
        assert np.array_equal(agent.position(states), np.pad(states, ((0, 0), (1, 0))))
    room = even_map(decision, agent)
    assert (room.path.tolist(), room.goals.tolist()) == ([[0, 4]], [[0, 8]])


@pytest.mark.parametrize(("goals", "marks"), [([[8], [8]], ["1", "2"]), (8, [])])
def test_several_goals_are_marked_with_their_order_and_one_is_not(adapter, tmp_path, goals, marks):
    agent = adapter(ABOUT, f'"task": task, "goal": {goals}}}')
    room = even_map(agent.decisions[1], agent)
    assert room.numbers()["goals"] == [[0, goal] for goal in np.ravel(goals).tolist()]
    _, texts, _ = drawn(tmp_path / "a.png", room)
    assert [text for text in texts if text in ("1", "2", "3")] == marks


def test_a_room_is_as_large_as_samples_reach_unless_it_is_said(adapter):
    assert adapter(POSITION, "return 3, state[0] // 3").room == (4, 3)
    assert adapter("np.clip(states[t] + 2", "np.clip(0 * states[t] + 2").room == (1, 5)
    assert adapter(SAMPLED[0], SAMPLED[1].format((2, 12))).room == (2, 12)
    assert adapter("def position(", "def place(").room is None
