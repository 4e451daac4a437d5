"""Models that read (previous action, previous reward, state): which transition a token is of."""

import numpy as np
import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from test_examples import analysed

from historylens.tokens import NONE, QUERY, Tokens, order_of_time, sum_rows
from visualize_attention import main

LAYOUT = ("previous action", "previous reward", "state")
NAMES = [*LAYOUT, "time", "previous transition"]
ADAPTER = '''
import numpy as np, torch
from torch import nn
from historylens import Decision, Tokens

PARTS = ("previous action", "previous reward", "state")


class Model(nn.Module):
    """One head, whose scores are high for tokens that hold a reward."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, h):
        last = h.rewards.new_zeros(h.size, 1)
        action = torch.cat([last, h.actions + 1.0], 1)  # what the step before brought
        reward = torch.cat([last, h.rewards], 1)
        state = torch.cat([h.states[..., 0], h.query_states], 1)
        if len(PARTS) == 1:
            x = torch.stack([action, reward, state], 2)  # (B, n + 1, 3)
        else:
            x = torch.diag_embed(torch.stack([action, reward, state], 2)).flatten(1, 2)
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
        yield Decision(states[:12], rng.integers(3, size=12), rewards, states[12],
                       episodes=np.arange(12) // 4)


def act(model, history):
    return model(history)


def tokens(history):
    return Tokens.of(history.n, parts=PARTS)
'''


@given(
    st.integers(1, 6),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_a_previous_part_is_of_the_transition_before_its_step(n, parts, where):
    parts.insert(where % (len(parts) + 1), "previous reward")  # one of them at least
    transition, part = [], []
    for step in range(n + 1):
        for name in parts:
            if name.startswith("previous"):
                transition.append(step - 1 if step > 0 else NONE)
                part.append(name)
            else:
                transition.append(step if step < n else NONE)
                part.append(name if step < n else QUERY)
    found = Tokens.of(n, parts)
    assert found.transition.tolist() == transition
    assert found.part == tuple(part)
    assert found.decides == len(found) - 1
    assert found.n == n
    rows = np.random.default_rng(n).random((1, len(found)))
    for t in range(n):
        own = sum(w for w, of in zip(rows[0], transition, strict=True) if of == t)
        np.testing.assert_allclose(sum_rows(rows, [found])[0, t], own)


@given(st.integers(1, 6), st.sampled_from([LAYOUT, LAYOUT[1:], ("previous transition",)]))
def test_such_a_model_reads_in_the_order_of_time_as_pictures_show_it(n, parts):
    tokens = Tokens.of(n, parts)
    assert order_of_time(tokens).tolist() == list(range(len(tokens)))


def test_a_token_a_step_is_no_plain_map_and_what_decides_is_last_unless_another_is_said_to():
    three, one = Tokens.of(2, LAYOUT), Tokens.of(2, "previous transition")
    assert three.parts == ("state", "previous action", "previous reward")
    assert (one.transition.tolist(), one.decides, one.is_plain) == ([-1, 0, 1], 2, False)
    assert Tokens.of(2, LAYOUT, decides=5).decides == 5
    with pytest.raises(ValueError, match=r"expected query as 'last' beside .*, got 'first'"):
        Tokens.of(2, LAYOUT, query="first")


MERGED = (
    'PARTS = ("previous action", "previous reward", "state")',
    'PARTS = ("previous transition",)',
)


@pytest.fixture(params=[(), (MERGED,)], ids=["three", "merged"])
def adapter(request, tmp_path, monkeypatch):
    """The adapter in a file, and whether a step is one token, a merged one."""
    monkeypatch.syspath_prepend(tmp_path)
    text = ADAPTER
    for old, new in request.param:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text)
    return tmp_path / "mine.py", bool(request.param)


def test_what_lies_on_a_reward_is_of_the_transition_that_earned_it(adapter, tmp_path):
    _, rows = analysed(adapter[0], tmp_path / "figs")
    assert min(float(row["mass_rewarded"]) for row in rows) > 0.99
    assert len(list(tmp_path.glob("figs/layer_0/*.png"))) == 2


def test_the_layout_of_the_next_step_is_refused_with_its_name(adapter, tmp_path, capsys):
    path, is_merged = adapter
    usual = "parts=('action', 'reward', 'state')[-len(PARTS):]"
    path.write_text(path.read_text().replace("parts=PARTS", usual))
    flags = ["--adapter", path, "--out", tmp_path / "figs", "--device=cpu"]
    said = refused(main, flags, capsys)
    assert ("('previous transition',)" if is_merged else "got one of 37 tokens") in said
