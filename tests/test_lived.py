import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from acting.lived import Lived
from compression import episode_ids


def transitions(n_steps, n_rooms=2, state_size=3, dtype=torch.int64, seed=0):
    """`n_steps` random transitions of every room: a list of (s, a, r, s')."""
    g = torch.Generator().manual_seed(seed)

    def states():
        return torch.randint(9, (n_rooms, state_size), generator=g)

    return [
        (
            states().to(dtype),
            torch.randint(5, (n_rooms,), generator=g),
            torch.randint(2, (n_rooms,), generator=g),
            states().to(dtype),
        )
        for _ in range(n_steps)
    ]


@given(
    n_steps=st.integers(0, 12),
    n_rooms=st.integers(1, 3),
    dtype=st.sampled_from([torch.int64, torch.float32]),
    data=st.data(),
)
def test_the_history_is_what_was_appended(n_steps, n_rooms, dtype, data):
    first = data.draw(st.integers(0, n_steps))
    steps = transitions(n_steps, n_rooms, dtype=dtype)
    lived = Lived(n_rooms, n_steps=12, state_size=3, state_dtype=dtype)
    for step in steps:
        lived.append(*step)
    query = torch.ones(n_rooms, 3)
    history = lived.history(query, first)
    assert (history.size, history.n, lived.n) == (n_rooms, n_steps - first, n_steps)
    assert history.states.dtype == history.next_states.dtype == dtype
    for t, (s, a, r, s_next) in enumerate(steps[first:]):
        assert torch.equal(history.states[:, t], s)
        assert torch.equal(history.actions[:, t], a)
        assert torch.equal(history.rewards[:, t], r.float())
        assert torch.equal(history.next_states[:, t], s_next)
    assert torch.equal(history.query_states, query)


def test_episodes_are_numbered_by_their_ends():
    lived = Lived(2, n_steps=11, state_size=3)
    for t, step in enumerate(transitions(11)):
        lived.append(*step, done=t % 4 == 3)
    history = lived.history(torch.zeros(2, 3))
    assert torch.equal(history.episodes, episode_ids(11, 4, 3).expand(2, -1))
    assert lived.history(torch.zeros(2, 3), first=7).episodes[0].tolist() == [1, 2, 2, 2]


def test_a_history_is_a_view_that_later_transitions_leave_as_it_is():
    lived = Lived(2, n_steps=6, state_size=3)
    steps = transitions(6)
    for step in steps[:4]:
        lived.append(*step)
    early = lived.history(torch.zeros(2, 3))
    before = [part.clone() for part in early.inputs]
    for step in steps[4:]:
        lived.append(*step)
    assert all(torch.equal(x, y) for x, y in zip(early.inputs, before, strict=True))
    late = lived.history(torch.zeros(2, 3))
    assert late.states.data_ptr() == early.states.data_ptr()
    assert late.rewards.data_ptr() == early.rewards.data_ptr()


def test_rewards_keep_their_fractions():
    lived = Lived(1, n_steps=2, state_size=1)
    for reward in (1, 0.25):
        state = torch.zeros(1, 1, dtype=torch.int64)
        lived.append(state, torch.tensor([0]), torch.tensor([reward]), state)
    assert lived.history(torch.zeros(1, 1)).rewards.tolist() == [[1.0, 0.25]]


def test_tasks_are_handed_on():
    lived = Lived(3, n_steps=1, state_size=1, tasks=torch.tensor([4, 4, 7]))
    assert lived.history(torch.zeros(3, 1)).tasks.tolist() == [4, 4, 7]


def test_a_full_store_is_an_error():
    lived = Lived(2, n_steps=1, state_size=3)
    first, second = transitions(2)
    lived.append(*first)
    with pytest.raises(ValueError, match="at most the 1 transitions"):
        lived.append(*second)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("states", lambda s, a, r, n: (s[:, :2], a, r, n)),
        ("actions", lambda s, a, r, n: (s, a[:1], r, n)),
        ("rewards", lambda s, a, r, n: (s, a, r[:, None], n)),
        ("next_states", lambda s, a, r, n: (s, a, r, n[:1])),
        ("states", lambda s, a, r, n: (s + 0.5, a, r, n)),
        ("actions", lambda s, a, r, n: (s, a + 0.5, r, n)),
    ],
)
def test_what_does_not_fit_is_an_error_and_leaves_the_store_as_it_was(name, change):
    lived = Lived(2, n_steps=3, state_size=3)
    step = transitions(1)[0]
    with pytest.raises(ValueError, match=f"expected {name} "):
        lived.append(*change(*step))
    lived.append(*step)
    history = lived.history(torch.zeros(2, 3))
    assert torch.equal(history.states[:, 0], step[0])
    assert history.n == 1
