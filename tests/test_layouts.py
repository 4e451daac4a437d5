"""Models that read (previous action, previous reward, state): which transition a token is of."""

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from test_examples import analysed

from historylens.tokens import NONE, QUERY, Tokens
from visualize_attention import main

LAYOUT = ("previous action", "previous reward", "state")
NAMES = [*LAYOUT, "time", "previous transition"]
ADAPTER = '''
import numpy as np, torch
from torch import nn
from historylens import Decision, Tokens


class Model(nn.Module):
    """One head, whose scores are high for steps that hold the reward of the one before."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, h):
        last = h.rewards.new_zeros(h.size, 1)
        action = torch.cat([last, h.actions + 1.0], 1)  # what the step before brought
        reward = torch.cat([last, h.rewards], 1)
        state = torch.cat([h.states[..., 0], h.query_states], 1)
        x = torch.stack([action, reward, state], 2)  # (B, n + 1, 3)
        key = torch.tensor([0.1, 40, 0.1]) * x
        y = nn.functional.scaled_dot_product_attention(
            torch.ones_like(x)[:, None], key[:, None], x[:, None], is_causal=True)[:, 0]
        return self.head(x + y)[:, -1]


def load():
    return Model()


def samples(n, seed):
    rng = np.random.default_rng(seed)
    for i in range(n):
        states, rewards = rng.random(13).astype(np.float32), np.arange(12) == 4 + i
        yield Decision(states[:12], rng.integers(3, size=12), rewards, states[12])


def act(model, history):
    return model(history)


def tokens(history):
    return Tokens.of(history.n, parts=("previous transition",))
'''


@given(
    st.integers(1, 6), st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.integers(0, 3)
)
def test_a_previous_part_is_of_the_transition_before_its_step(n, parts, where):
    parts.insert(where % (len(parts) + 1), "previous reward")  # one of them at least
    expected = []
    for step in range(n + 1):
        for name in parts:
            if name.startswith("previous"):
                expected.append((step - 1 if step > 0 else NONE, name))
            else:
                expected.append((step, name) if step < n else (NONE, QUERY))
    found = Tokens.of(n, parts)
    assert [*zip(found.transition, found.part, strict=True)] == expected
    assert (found.decides, found.n) == (len(found) - 1, n)


def test_a_token_a_step_is_no_plain_map_and_what_decides_is_last_unless_another_is_said_to():
    three, one = Tokens.of(2, LAYOUT), Tokens.of(2, "previous transition")
    assert three.parts == ("state", "previous action", "previous reward")
    assert (one.transition.tolist(), one.decides, one.is_plain) == ([-1, 0, 1], 2, False)
    assert Tokens.of(2, LAYOUT, decides=5).decides == 5
    with pytest.raises(ValueError, match=r"expected query as 'last' beside .*, got 'first'"):
        Tokens.of(2, LAYOUT, query="first")


def test_what_lies_on_a_reward_is_of_the_transition_that_earned_it(tmp_path, monkeypatch, capsys):
    """And a map of the step that it stands in is refused, with the name of the right one."""
    monkeypatch.syspath_prepend(tmp_path)
    path, out = tmp_path / "mine.py", tmp_path / "figs"
    path.write_text(ADAPTER)
    _, rows = analysed(path, out)
    assert min(float(row["mass_rewarded"]) for row in rows) > 0.99
    assert len(list(out.glob("layer_0/*.png"))) == 2
    path.write_text(ADAPTER.replace('parts=("previous transition",)', ""))
    said = refused(main, ["--adapter", path, "--out", out, "--device=cpu"], capsys)
    assert "('previous transition',)" in said
