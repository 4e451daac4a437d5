"""What heads read: planted ones are named for it in any layout, and figures are those of loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_rows import PARTS
from hypothesis import given
from hypothesis import strategies as st

from historylens.effects.roles import MAIN, ROLES, Keys, roles_of
from historylens.history import Decision, History
from historylens.tokens import NONE, Tokens, uniform_rows

LAYOUTS = ("one", "three", "previous", "query first", "padded")
PARTS_OF = {  # of a transition
    "three": PARTS,
    "previous": ("previous action", "previous reward", "state"),
    "return": ("return", "state", "action"),
}
N_CELLS, HORIZON = 8, 10


def walk(rng, n, skill, restless):
    """An agent on a ring, from cell 0 every episode: a decision, and the action taken now.

    It knows the way to its goal more and more often, to `skill` at the end; else it stays, or, if
    `restless`, goes to either side.
    """
    goal, cell, taken = rng.integers(1, N_CELLS), 0, rng.integers(HORIZON)
    episodes = (np.arange(n + 1) + taken) // HORIZON
    states, actions, rewards = np.zeros((3, n + 1), dtype=np.int64)
    for t in range(n + 1):
        cell = 0 if t and episodes[t] > episodes[t - 1] else cell
        action = rng.choice([0, 1, -1], p=[1 - restless, restless / 2, restless / 2])
        if rng.random() < skill * t / max(n, 1):
            action = int(cell != goal)
        states[t], actions[t], cell = cell, action, (cell + action) % N_CELLS
        rewards[t] = cell == goal
    after = states[1:, None]
    past = states[:-1, None], actions[:-1], rewards[:-1]
    return Decision(*past, states[-1:], after, episodes[:-1] - episodes[0]), actions[-1]


def histories(seed, size=12, n=60, skill=0.5, restless=0.6):
    """What lies before `size` such decisions, and the actions taken now `(B,)`."""
    rng = np.random.default_rng(seed)
    decisions, actions = zip(*[walk(rng, n, skill, restless) for _ in range(size)], strict=True)
    return History.of(decisions), np.array(actions)


def layout(name, n):
    """A map of `n` transitions, and which of its tokens can be seen `(T,)`."""
    if name == "padded":
        tokens = Tokens([-1] * 4 + [*range(n), -1], ("padding",) * 4 + ("t",) * n + ("query",))
    else:
        parts = PARTS_OF.get(name, ("transition",))
        tokens = Tokens.of(n, parts, "first" if name == "query first" else "last")
    return tokens, np.array([part != "padding" for part in tokens.part])


def of_role(name, history, actions, b):
    """Transitions of decision `b` that are of a role, by plain loops."""
    states, acted, rewards, episodes = (
        x[b].tolist() for x in (history.states, history.actions, history.rewards, history.episodes)
    )
    n, here = history.n, history.query_states[b].tolist()
    is_of = {
        "recency": lambda i: i == n - 1,
        "rewarded": lambda i: rewards[i] > 0,
        "same state": lambda i: states[i] == here,
        "same state and action": lambda i: states[i] == here and acted[i] == actions[b],
        "episode start": lambda i: i > 0 and episodes[i] != episodes[i - 1],
        "induction": lambda i: i > 0 and states[i - 1] == here,
        "first": lambda i: i == 0,
    }
    return [i for i in range(n) if is_of[name](i)]


def planted(name, history, actions, tokens, visible, spare="uniform"):
    """Rows `(B, T)`, even over what is of a role: where that is nothing, of `spare`."""
    rests = {"sink": [NONE], "uniform": range(NONE, history.n)}
    chosen = [
        rests.get(name) or of_role(name, history, actions, b) or rests[spare]
        for b in range(history.size)
    ]
    return uniform_rows(np.array([np.isin(tokens.transition, own) & visible for own in chosen]))


def told_of(seed, name="one", n=60, **options):
    """What `planted` and `named` are told: history, actions now, map, and what can be seen."""
    return *histories(seed, n=n, **options), *layout(name, n)


def roles_in(rows, history, actions, tokens, visible):
    """Roles of heads by their rows, `(B, T)` each."""
    seen = np.broadcast_to(visible, rows[0].shape)
    return roles_of(np.stack(rows, axis=1), seen, [tokens] * history.size, history, actions)


def named(rows, *told):
    return [role.name for role in roles_in(rows, *told)]


def heads(roles, history, actions, name="one", spare="uniform", visible=True):
    """What heads planted for roles are named."""
    tokens, seen = layout(name, history.n)
    told = history, actions, tokens, seen & visible
    return named([planted(role, *told, spare) for role in roles], *told)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_is_named_for_what_it_reads(name, seed):
    rng = np.random.default_rng(seed)
    size, n = int(rng.integers(8, 24)), int(rng.integers(40, 90))
    told = told_of(seed, name, n, size=size, skill=rng.uniform(0, 0.9))
    clean = [planted(role, *told) for role in ROLES]
    assert named(clean, *told) == list(ROLES)
    noise = np.exp(rng.normal(size=(len(clean), *clean[0].shape)) / 2)
    rows = (0.85 * np.stack(clean) + 0.15 * uniform_rows(told[-1])) * noise * told[-1]
    assert named(rows / rows.sum(-1, keepdims=True), *told) == list(ROLES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_this_and_half_that_is_mixed_and_both_are_said(name):
    told = told_of(1, name, 51)
    pairs = [("rewarded", "recency"), ("same state", "recency"), ("first", "rewarded")]
    pairs += [("episode start", "sink"), ("rewarded", "uniform"), ("induction", "episode start")]
    rows = [sum(planted(role, *told) for role in pair) / 2 for pair in pairs]
    for pair, role in zip(pairs, roles_in(rows, *told), strict=True):
        assert (role.name, role.part < MAIN) == ("mixed", True)
        words = [ROLES[{"first": "sink"}.get(name, name)][0] for name in pair]
        assert all(x in role.text for x in words)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_that_rests_where_there_is_nothing_of_its_kind_keeps_its_role(name):
    history, actions = histories(1, size=40, n=16, skill=0.1)
    few = ("rewarded", "same state", "same state and action", "induction")
    there = [sum(bool(of_role(x, history, actions, b)) for b in range(40)) for x in few]
    assert max(there[0], there[2]) < 30  # of 40 decisions
    for spare in ("sink", "uniform"):
        assert heads(few, history, actions, name, spare) == list(few)


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, parts in PARTS_OF.items() for part in parts]
)
def test_one_token_of_three_is_enough_and_actions_taken_here_are_what_followed(name, part):
    told = told_of(2, name)
    kinds = ["recency", "rewarded", "same state", "episode start"]
    rows = [planted(role, *told) * (np.array(told[2].part) == part) for role in kinds]
    kinds[2] = "induction" if part.endswith("action") else "same state"
    assert named([row / row.sum(-1, keepdims=True) for row in rows], *told) == kinds


@pytest.mark.parametrize("name", ["one", "three"])
def test_where_an_agent_stays_the_kinds_that_overlap_are_told_apart(name):
    history, actions = histories(3, n=40, skill=1.0, restless=0.02)
    overlap = [len(of_role("same state", history, actions, b)) for b in range(12)]
    assert np.mean(overlap) > 10  # of 40 transitions, most of them rewarded and recent
    kinds = ["recency", "rewarded", "same state", "induction"]
    assert heads(kinds, history, actions, name) == kinds
    told = told_of(4, name, n=40, skill=1.0, restless=0.02)
    elsewhere = planted("induction", *told, "sink") * (planted("same state", *told, "sink") == 0)
    elsewhere += (elsewhere.sum(-1, keepdims=True) == 0) * planted("sink", *told)
    [role] = roles_in([elsewhere / elsewhere.sum(-1, keepdims=True)], *told)
    assert (role.name, role.part > 0.95) == ("induction", True)


def test_a_narrower_kind_is_claimed_only_if_the_rest_of_the_wider_one_is_not_read():
    told = told_of(4)
    state, action = (planted(f"same state{x}", *told) for x in ("", " and action"))
    share = [(row * (action > 0)).sum(-1).mean() for row in (state, action)]
    assert 0.2 < share[0] < 0.9 < share[1]
    state_too = 0.5 * state + 0.5 * action  # no part is enough, but all of it is of this state
    expected = ["same state", "same state and action", "same state"]
    assert named([state, action, state_too], *told) == expected


def test_what_coincides_in_all_decisions_goes_to_the_first_in_the_table():
    history, actions = histories(5)
    kinds = ["rewarded", "same state", "same state and action"]
    assert heads(kinds, history, actions) == kinds
    same = replace(history, actions=0 * history.actions)
    assert heads(kinds, same, 0 * actions) == ["rewarded", "same state", "same state"]
    same = replace(history, states=history.rewards[..., None], query_states=torch.ones(12, 1))
    assert heads(kinds, same, actions) == ["rewarded", "rewarded", "same state and action"]


def all_new(n_same, size=20, n=40):
    """Histories in which no state is met twice, but for that of the latest transitions and now.

    `n_same` of them in each decision, `(B,)` or a number for all.
    """
    history, actions = histories(6, size, n)
    states = torch.arange(n).repeat(size, 1)
    states[n - states <= torch.as_tensor(n_same).expand(size)[:, None]] = 99
    now = torch.full((size, 1), 99)
    return replace(history, states=states[..., None], query_states=now), actions


@pytest.mark.parametrize("n_read", [1, 4, 10])  # the latest, a tenth, a quarter
def test_the_latest_few_are_recency_also_where_a_few_more_are_of_this_state(n_read):
    told = *all_new(n_read + 2), *layout("one", 40)
    latest = np.isin(told[2].transition, range(40 - n_read, 40))
    rows = [uniform_rows(np.broadcast_to(latest, (20, 41))), planted("same state", *told)]
    assert named(rows, *told) == ["recency", "same state"]


def test_a_kind_that_is_seldom_there_claims_little():
    some = [1] * 4 + [0] * 16  # decisions whose latest transition is of this state
    assert heads(["recency", "same state"], *all_new(some)) == ["recency", "same state"]
    assert heads(["same state"], *all_new(some), spare="sink") == ["same state"]
    assert heads(["same state"], *all_new([1] + [0] * 19), spare="sink") == ["sink"]


def test_without_rewards_or_known_episodes_the_others_are_found():
    history, *told = told_of(7)
    bare = replace(history, rewards=0 * history.rewards, episodes=None)
    rows = {role: planted(role, history, *told) for role in ROLES}
    lost = [rows.pop("rewarded"), rows.pop("episode start")]
    assert named([*rows.values()], bare, *told) == [*rows]
    assert set(named(lost, bare, *told)) == {"mixed"}


def test_few_tokens_at_random_a_kind_of_nearly_all_and_keys_that_are_no_tokens_are_no_role():
    rng, n = np.random.default_rng(8), 80
    rows = [np.eye(n + 1)[rng.integers(n, size=40)] for _ in range(20)]
    rows += [np.eye(n + 1)[np.full(40, place)] for place in (20, 41)]
    assert set(named(rows, *told_of(8, n=n, size=40))) == {"mixed"}
    history, *told = told_of(6)
    rows = np.broadcast_to(np.append(np.full(60, 1 / 60), 0), (12, 61))
    all_rewarded = replace(history, rewards=torch.ones_like(history.rewards))
    assert named([rows], all_rewarded, *told) == ["uniform"]
    for n_rewarded, kind in ((52, "rewarded"), (58, "uniform")):  # of 60
        most = torch.arange(60).expand_as(history.rewards) < n_rewarded
        row = np.append(np.arange(60) < n_rewarded, False) / n_rewarded
        most = replace(history, rewards=most.to(history.rewards))
        assert named([np.tile(row, (12, 1))], most, *told) == [kind]
    rows = [share * planted("rewarded", history, *told) for share in (0.1, 0.5, 0.8)]
    assert named(rows, history, *told) == ["sink", "mixed", "rewarded"]  # the rest is at rest


def test_what_the_mask_hides_is_not_expected_to_be_read():
    kinds = ["sink", "rewarded", "same state", "uniform"]
    window = np.arange(61) >= 40  # of 20 transitions
    assert heads(kinds, *histories(10), visible=window) == kinds


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_transition_alone_is_a_sink_and_short_histories_have_few_kinds(name):
    assert heads(["first"], *histories(0), name) == ["sink"]
    kinds = ["sink", "recency", "uniform"]
    for n in (1, 2):
        assert heads(kinds, *histories(11, size=8, n=n, restless=1.0), name) == kinds


def test_the_figures_are_means_over_the_decisions_that_have_such_tokens_and_are_in_the_words():
    states, rewards = np.arange(23)[:, None], np.isin(np.arange(23), [3, 7, 8, 15, 20])
    zeros, now = 0 * states[:, 0], np.array([99])
    decisions = [Decision(states, zeros, r, now, states, zeros) for r in (1 * rewards, zeros)]
    query = np.arange(24) == 23  # read where nothing was rewarded
    row = np.where(np.append(rewards, False), 0.83 / 5, 0.17 / 19)
    rows = [np.stack([row, query]), np.stack([np.roll(query, -1)] * 2)]
    found = roles_in(rows, History.of(decisions), [0, 0], *layout("one", 23))
    assert [(one.name, one.text) for one in found] == [
        ("rewarded", "83% on rewarded transitions, evenly 21%"),
        ("recency", "100% on the latest quarter, evenly 21%"),
    ]
    np.testing.assert_allclose([(x.share, x.even) for x in found], [(0.83, 5 / 24), (1, 5 / 24)])


@given(st.integers(0, 10**6), st.sampled_from(LAYOUTS), st.floats(0.05, 0.95))
def test_parts_of_a_mixture_are_found(seed, name, part):
    told = told_of(seed, name, 40, size=10, skill=0.3)
    rest = uniform_rows(np.broadcast_to(told[-1], (10, len(told[-1]))))
    [role] = roles_in([part * planted("episode start", *told) + (1 - part) * rest], *told)
    expected = "episode start" if part >= MAIN else "uniform" if part <= 1 - MAIN else "mixed"
    assert role.part == pytest.approx(max(part, 1 - part), abs=0.03)
    assert role.name in (expected, "mixed") if role.part < MAIN + 0.03 else role.name == expected


@pytest.mark.parametrize(("episodes", "starts"), [
    ([0, 0, 1, 1, 1, 2], [2, 5]),  # the oldest is cut: another is longer
    ([0, 0, 0, 1, 1, 1, 2], [0, 3, 6]),
    ([0, 0, 0], []),  # nothing tells where the only one began
])  # fmt: skip
def test_the_oldest_transition_starts_an_episode_only_if_that_is_whole(episodes, starts):
    n = len(episodes)
    zeros, states = np.zeros(n, dtype=int), np.arange(n)[:, None]
    decision = Decision(states, zeros, zeros, states[0], states, np.array(episodes))
    seen = np.ones((1, n + 1), dtype=bool)
    keys = Keys(seen, [Tokens.of(n)], History.of([decision]), zeros[:1])
    assert np.flatnonzero(keys.starts()).tolist() == starts
