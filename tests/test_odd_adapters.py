"""What an adapter may give that no model, table or room can hold: one line, never a traceback."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from historylens.adapter.agent import load
from historylens.adapter.given import GymRooms, read_tasks
from historylens.common.errors import UserError

EXAMPLE = Path(__file__).parents[1] / "examples" / "sar_mha.py"
MORE = """
import itertools
first, logits = next(samples(1, 0)), act


class Mute(BaseException):
    def __str__(self):
        raise ValueError


def decision(**changed):
    return Decision(**vars(first) | changed)


def samples(n, seed):
    return [decision() for _ in range(n)]
"""


def loaded(folder, *more, n=3):
    """The agent of the example with some definitions replaced."""
    path = folder / "mine.py"
    path.write_text("\n".join([EXAMPLE.read_text(), MORE, *more]))
    return load(path, n, 0, torch.device("cpu"))


def test_an_endless_generator_gives_what_is_asked_for(tmp_path):
    more = "def samples(n, seed): return (decision() for _ in itertools.count())"
    assert len(loaded(tmp_path, more, n=7).decisions) == 7


@pytest.mark.parametrize("error", ["Mute()", "SystemExit(3)", "OSError(28, 'a')"])
@pytest.mark.parametrize("name", ["load()", "samples(n, seed)", "act(model, history)"])
def test_whatever_an_adapter_raises_is_its_own_line(tmp_path, name, error):
    said = rf"{name.partition('(')[0]}\(\) raised {error.partition('(')[0]}"
    with pytest.raises(UserError, match=said):
        loaded(tmp_path, f"def {name}: raise {error}")


ODD_FIELDS = [
    *(f"labels={{'a': {x}}}" for x in ("10**400", "2**60", "[1]", "float('inf')", "np.zeros(2)")),
    "labels=[1]", "labels={'layer': 1}",
    *(f"task={task}" for task in ("10**30", "1.5", "'a'", "[1]", "float('nan')")),
    "states=np.full(30, 1e300)", "rewards=np.full(30, np.nan)", "rewards=np.full(30, 1e30)",
    "states=np.full(30, 2**64 - 1, np.uint64)", "goal=[1e300]", "actions=np.full(30, 1e30)",
    "query_episode=2**63",
]  # fmt: skip


@pytest.mark.parametrize("changed", ODD_FIELDS)
def test_what_no_table_holds_and_numbers_that_would_become_others_are_told(tmp_path, changed):
    name = changed.partition("=")[0]
    with pytest.raises(UserError, match=rf"samples\(\)\[0\]\.{name}.*: expected"):
        loaded(tmp_path, f"def samples(n, seed): return [decision({changed})]")


def test_a_task_is_any_whole_number_or_none(tmp_path):
    more = "def samples(n, seed): return [decision(task=x) for x in (None, -5, np.int8(3))]"
    assert [one.task for one in loaded(tmp_path, more).decisions] == [None, -5, 3]


@pytest.mark.parametrize("given", [
    "x.long()", "x.to(torch.complex64)", "x.detach().numpy()", "None", "x[0]", "x[:, :1]",
    "x * float('nan')", "x.to_sparse()",
])  # fmt: skip
def test_logits_of_odd_types_are_told(tmp_path, given):
    more = f"def act(model, history):\n    x = logits(model, history)\n    return {given}"
    with pytest.raises(UserError, match=r"act\(\)"):
        loaded(tmp_path, more)


@pytest.mark.parametrize("given", ["10**400", "float('nan')", "'a'"])
def test_a_reward_to_count_from_is_a_number_that_rewards_can_be(tmp_path, given):
    with pytest.raises(UserError, match="REWARDED_ABOVE: expected a finite number"):
        loaded(tmp_path, f"REWARDED_ABOVE = {given}")


def test_halves_of_characters_are_shown_as_what_can_be_written(tmp_path):
    text = "decision(title='a\\ud800', labels={'b\\ud800': 'c\\udfff', (1, 2): 3})"
    (one,) = loaded(tmp_path, f"def samples(n, seed): return [{text}]").decisions
    assert (one.title, one.labels) == ("a?", {"b?": "c?", "(1, 2)": 3})


def test_logits_are_plain_numbers_of_as_many_actions_in_every_call(tmp_path):
    more = "def act(model, history):\n    x = logits(model, history).clone().requires_grad_()\n"
    more += "    return x.as_subclass(nn.Parameter) if history.n else x.repeat(1, 2)"
    agent = loaded(tmp_path, more)
    found = agent.act(history := agent.history([0]))
    assert (type(found), found.requires_grad) == (torch.Tensor, False)
    with pytest.raises(UserError, match="logits of 2 actions, as many as at first, got 4"):
        agent.act(history.latest(0))


def test_names_of_tasks_can_be_shown_and_written(tmp_path):
    odd = "GOALS, HORIZON = ['a\\nb', '\\x1b[2J', '\\ud800', 7], 5\ndef make_env(goals): ..."
    shown = "a\\nb", "\\x1b[2J", "\\ud800", "7"
    assert read_tasks(loaded(tmp_path, odd).adapter) == (shown, 5)
    with pytest.raises(UserError, match="GOALS raised ValueError"):
        read_tasks(loaded(tmp_path, odd, "GOALS = [Mute()]").adapter)


STATES, REWARDS, NOT = np.zeros((2, 1)), np.zeros(2), np.zeros(2, bool)
GIVEN = {
    "five texts": tuple("abcde"), "ragged": ([[1], [1, 2]], REWARDS, NOT, NOT, {}),
    "wide": (np.zeros((2, 3)), REWARDS, NOT, NOT, {}), "no rewards": (STATES, None, NOT, NOT, {}),
    "nan": (STATES, np.full(2, np.nan), NOT, NOT, {}), "scalars": (0, 0, 0, 0, {}),
    "huge rewards": (STATES, np.full(2, 1e38), NOT, NOT, {}),
    "huge states": (np.full((2, 1), 1e300), REWARDS, NOT, NOT, {}),
    "no ends": (STATES, REWARDS, [None, [1]], NOT, {}),
    "complex": (STATES, np.full(2, 1j), NOT, NOT, {}),
    "infos": (STATES, REWARDS, NOT, NOT, [3]), "many": (np.zeros((3, 1)), REWARDS, NOT, NOT, {}),
}  # fmt: skip


@pytest.mark.parametrize("what", GIVEN)
def test_what_an_environment_must_not_give_is_told(tmp_path, what):
    adapter = loaded(tmp_path).adapter
    own = {"reset": lambda **_: (STATES, {}), "step": lambda _: GIVEN[what], "metadata": None}
    rooms = SimpleNamespace(**own)
    adapter.module.make_env = lambda goals: rooms
    rooms = GymRooms(adapter, np.zeros(1), 5, np.zeros(2, int), [0])
    rooms.reset()
    with pytest.raises(UserError, match="environment"):
        rooms.step(np.zeros(2, int))
