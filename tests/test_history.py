"""Decisions, batches of histories, their store, and looks: cut, kept, split, refused, read."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from agents import ModelAgent, Recorder
from compression_cases import decisions_of, generator, histories, known, make_history, same
from conftest import random_window, sharp_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_model import encoder_layer
from wired import BROUGHT, OWN, REWARDED, Layer, WiredAgent, latest, rewarded

from config import ModelConfig
from historylens import agent as agents
from historylens.agent import Unreadable, act_in_parts, attend, look
from historylens.common.errors import UserError
from historylens.history import LOOKS, Decision, History, HistoryBuffer, episode_ids

INDICES = torch.tensor([[-1, 2], [0, 5], [-1, -1], [-1, 4]])


def test_a_decision_knows_its_rewards_and_episodes_and_ids_count_back_from_its_own():
    decision = Decision([4, 5, 6, 7], [0] * 4, [0, 1, -1, 0.5], 8, episodes=[3, 3, 4, 6])
    assert (decision.n, decision.rewarded.tolist()) == (4, [False, True, False, True])
    assert decision.episode_starts.tolist() == [0, 2, 3]
    assert Decision([4, 5], [0, 0], [0, 0], 8).episode_starts.tolist() == [0]
    assert Decision([], [], [], 8, episodes=[]).episode_starts.tolist() == []
    ids = episode_ids(7, horizon=3, steps_taken=torch.tensor([0, 1, 2]))
    assert ids.tolist() == [[0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2, 2]]
    assert episode_ids(0, horizon=3, steps_taken=0).shape == (1, 0)


def test_histories_of_decisions_and_what_a_user_gives_are_whole_numbers_or_float32():
    given = make_history(size=3, n=5)
    arrays = {name: value.tolist() for name, value in known(given).items()}
    assert same(History(**arrays).checked(), given)
    history = History.of(decisions := decisions_of(given))
    assert all(torch.equal(a, b) for a, b in zip(history.inputs, given.inputs, strict=True))
    assert (history.tasks.tolist(), history.episodes) == ([0, 0, 1], None)
    small = History.of([replace(d, rewards=np.array(d.rewards, np.float64)) for d in decisions])
    assert (small.rewards.dtype, small.actions.dtype) == (torch.float32, torch.int64)
    assert History.of([replace(decisions[0], task=None), decisions[1]]).tasks is None


def test_take_and_rows_choose_from_every_field():
    history = make_history(size=2, n=5)
    shorter = history.take(indices := torch.tensor([[0, 3], [2, 4]]))
    assert shorter.kept is indices
    of_decisions = "query_states", "query_episodes", "tasks"
    fields = known(history).keys() - ("last_rows", "head_attention", *of_decisions)
    assert len(fields) == 9  # of transitions
    for b, kept in enumerate(indices.tolist()):
        for name in fields:
            assert torch.equal(getattr(shorter, name)[b], getattr(history, name)[b, kept])
        assert torch.equal(shorter.last_rows[b], history.last_rows[b][:, kept])
        assert torch.equal(shorter.head_attention[b], history.head_attention[b][..., kept])
    for name in of_decisions:
        assert torch.equal(getattr(shorter, name), getattr(history, name))
    chosen = known(shorter.rows(torch.tensor([1, 0, 1])))
    assert all(torch.equal(chosen[name], v[[1, 0, 1]]) for name, v in known(shorter).items())


@given(history=histories(), n=st.integers(0, 32))
def test_the_latest_are_the_end_and_nothing_counts_as_left_out(history, n):
    assert known(history.unlooked()).keys() == known(history).keys() - LOOKS
    if n >= history.n:
        assert history.latest(n) is history
        return
    taken = history.take(torch.arange(history.n - n, history.n).expand(history.size, -1))
    assert same(history.latest(n), replace(taken, kept=None))


def test_histories_that_keep_unequal_counts_are_split_fewest_first():
    history = make_history(size=4, n=6)
    shorter = history.take(INDICES)
    assert (history.counts.tolist(), shorter.counts.tolist()) == ([6] * 4, [1, 2, 0, 1])
    parts = [(rows.tolist(), part) for rows, part in shorter.by_count()]
    assert [(part.n, rows) for rows, part in parts] == [(0, [2]), (1, [0, 3]), (2, [1])]
    for rows, part in parts:
        for b, row in enumerate(rows):
            kept = [i for i in INDICES[row].tolist() if i >= 0]
            assert part.kept[b].tolist() == kept
            assert torch.equal(part.states[b], history.states[row, kept])
    ((rows, whole),) = history.by_count()
    assert (rows.tolist(), whole is history) == ([0, 1, 2, 3], True)


@pytest.mark.parametrize("max_tokens", [1, 6, 2**14])
def test_acting_in_parts_reads_no_padding_and_keeps_the_order(max_tokens, monkeypatch):
    """Logits: what is kept, its rewards, and where the first and the query stand."""
    monkeypatch.setattr("historylens.agent.MAX_TOKENS_ACTING", max_tokens)
    history = make_history(size=4, n=6)
    agent = Recorder(logits=lambda part: part.rewards.sum(1, keepdim=True) + 10 * part.n)
    logits = act_in_parts(agent, history.take(INDICES), torch.arange(12).view(4, 3))
    kept = [[i for i in row if i >= 0] for row in INDICES.tolist()]
    rewards = [history.rewards[b, own].sum() + 10 * len(own) for b, own in enumerate(kept)]
    assert logits[:, 0].tolist() == rewards
    placed = sorted(row for part in agent.positions for row in part.tolist())
    assert placed == [[1, 2], [3, 4, 5], [8], [10, 11]]
    assert max(h.size * (h.n + 1) for h in agent.histories) <= max(max_tokens, 3)
    act_in_parts(agent, history.take(INDICES))
    assert agent.positions[-1] is None


@pytest.mark.parametrize(("field", "value", "words"), [
    *[(name, x[..., :1], f"{name}.* of shape") for name, x in known(make_history()).items()],
    ("actions", torch.zeros(5), r"states of shape \(B, n, S\), got \(5,\)"),
    ("query_attention", torch.tensor([[-0.1] * 12] * 2), "query_attention after the softmax"),
    ("received", torch.tensor([[torch.nan] * 12] * 2), "received after the softmax"),
    ("last_rows", torch.tensor([[[torch.inf] * 12]] * 2), "last_rows after the softmax"),
    ("head_attention", torch.full((2, 1, 1, 12), -0.1), "head_attention after the softmax"),
    ("head_attention", torch.ones(2, 3, 12), r"of shape \(2, 3, 12, 12\)"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        replace(make_history(), **{field: value}).checked()


def filled(n_steps, dtype=torch.int64):
    """A store of two rooms in episodes of four steps, and its transitions, random (s, a, r, s')."""
    g, buffer, steps = generator(), HistoryBuffer(torch.empty(2, 3, dtype=dtype), n_steps=12), []
    for t in range(n_steps):
        s, after = torch.randint(9, (2, 2, 3), generator=g).to(dtype)
        a, r = torch.randint(9, (2, 2), generator=g)
        steps.append((s, a, r / 4, after))
        buffer.append(*steps[-1], done=t % 4 == 3)
    return buffer, steps


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from([torch.int64, torch.float32]))
def test_the_history_is_what_was_appended(n_steps, first, dtype):
    assume(first <= n_steps)
    (buffer, steps), query = filled(n_steps, dtype), torch.ones(2, 3)
    history = buffer.history(query, first)
    assert (history.size, history.n, buffer.n) == (2, n_steps - first, n_steps)
    assert history.states.dtype == history.next_states.dtype == dtype
    assert history.rewards.dtype == torch.float32
    assert torch.equal(history.query_states, query)
    assert torch.equal(history.episodes, (torch.arange(first, n_steps) // 4).expand(2, -1))
    assert history.kept is None
    for t, step in enumerate(steps[first:]):
        for part, value in zip(history.inputs, step, strict=False):
            assert torch.equal(part[:, t], value)


def test_a_history_is_a_view_that_later_transitions_leave_as_it_is():
    (buffer, steps), query = filled(4), torch.zeros(2, 3)
    early = buffer.history(query).inputs
    before = [part.clone() for part in early]
    buffer.append(*steps[0], done=False)
    assert all(torch.equal(x, y) for x, y in zip(early, before, strict=True))
    for old, new in zip(early, buffer.history(query).inputs, strict=True):
        assert old.data_ptr() == new.data_ptr()


CONFIG = {"n_transit": 14, "tf_n_inner": 24, "grid_size": 5}
SHAPES = [(1, 1), (2, 2), (3, 1)]  # layers, heads
CONFIGS = [ModelConfig(tf_n_layer=x, tf_n_head=h, tf_n_embd=8 * h, **CONFIG) for x, h in SHAPES]
AGENTS = dict(zip(SHAPES, [ModelAgent(sharp_model(one)) for one in CONFIGS], strict=True))


def random_history(n_samples, n):
    context, queries = random_window(CONFIGS[0], n_samples, n)
    return History(*context, queries[:, n])


def plain_look(model, history, sample):
    """What a look gives of one sample, token by token in float64, by the name of the field."""
    tensors = {name: t.double().numpy() for name, t in model.state_dict().items()}
    x = model.embed(*history.inputs)[sample].detach().double().numpy()
    n, n_heads, width = history.n, model.config.tf_n_head, x.shape[1]
    maps, norms, along = [], [], []
    for number in range(model.config.tf_n_layer):
        own = f"transformer_encoder.layers.{number}.self_attn"
        w, b = tensors[f"{own}.in_proj_weight"], tensors[f"{own}.in_proj_bias"]
        out = tensors[f"{own}.out_proj.weight"]
        values = x @ w[2 * width :].T + b[2 * width :]
        x, weights = encoder_layer(tensors, number, x, n_heads)
        shares = weights[:, n].repeat(width // n_heads, axis=0).T  # (T, D)
        added = [out @ read for read in shares * values]  # to the query, for each token
        whole, lengths = sum(added), [np.sqrt(v @ v) for v in added]
        norms.append([length / sum(lengths) for length in lengths[:n]])
        along.append([v @ whole / (whole @ whole) for v in added[:n]])
        maps.append(weights)
    mean = np.mean(maps, axis=(0, 1))  # (T, T), the query last
    return {
        "query_attention": mean[n, :n],
        "head_attention": np.stack(maps)[:, :, n, :n],
        "norm": np.mean(norms, axis=0),
        "contribution": np.mean(along, axis=0),
        "received": mean[:n, :n].sum(axis=0),
        "last_rows": mean[max(0, n - 8) : n, :n],
    }


@settings(max_examples=12)
@given(shape=st.sampled_from(list(AGENTS)), n=st.integers(1, 13), data=st.data())
def test_a_look_equals_the_attention_computed_token_by_token(shape, n, data):
    wanted = data.draw(st.sets(st.sampled_from(LOOKS)))
    history = random_history(3, n)
    with mock.patch.object(agents, "MAX_WEIGHTS", data.draw(st.sampled_from([1, 1000, 2**25]))):
        looked = look(AGENTS[shape], history, [*wanted, "episodes"]).checked()  # or in parts
    assert {name for name in LOOKS if vars(looked)[name] is not None} == wanted
    for sample in range(3):
        expected = plain_look(AGENTS[shape].model, history, sample)
        for name in wanted:
            value = vars(looked)[name][sample].numpy()
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-6)


def test_a_look_is_one_pass_and_a_second_only_for_whole_maps_beside_heads():
    agent = ModelAgent(sharp_model(CONFIGS[1]))
    history, n_passes = random_history(2, 9), []
    agent.model.register_forward_hook(lambda *_: n_passes.append(1))
    whole, heads = {"received", "last_rows"}, {"norm", "contribution"}
    for wanted in ([*LOOKS[:4]], ["query_attention", "norm"], [*whole], ["norm"], [*LOOKS]):
        look(agent, history, wanted)
        assert len(n_passes) == 1 + bool({*wanted} & whole and {*wanted} & heads), wanted
        n_passes.clear()


def test_without_history_the_query_reads_itself_in_every_layer():
    agent, none, cells = AGENTS[2, 2], np.zeros(0, int), np.zeros((0, 2), int)
    history = History.of([Decision(cells, none, none, np.array([2, 2]), cells, none)] * 2)
    logits, layers = attend(agent, history, received=True, maps=[1])
    torch.testing.assert_close(logits, agent.act(history), atol=1e-5, rtol=1e-5)
    assert len(layers) == 2
    for layer in layers:
        assert layer.visible.all()
        assert layer.query_rows.tolist() == layer.received.tolist() == [[[1.0]] * 2] * 2
        assert layer.maps.tolist() == [[[[1.0]]] * 2]


def test_layers_of_fewer_heads_have_no_attention_in_the_others():
    agent = WiredAgent(Layer((latest, OWN, BROUGHT)), Layer(*[(rewarded, OWN, BROUGHT)] * 2))
    shown = look(agent, agent.history([0, 1]), ["head_attention"]).head_attention
    assert shown.shape == (2, 2, 2, 20)
    assert shown[:, 0, 1].isnan().all()
    torch.testing.assert_close(shown[:, 1, 0, list(REWARDED)], torch.full((2, 3), 1 / 3))


def test_a_model_that_does_not_show_a_field_says_what_was_expected():
    agent, history = Recorder(), random_history(2, 4)
    for name in ("norm", "contribution"):
        with pytest.raises(Unreadable, match=r"tiny: expected heads side by side .* none$") as e:
            look(agent, history, ["query_attention", name])
        assert isinstance(e.value, UserError)
    assert look(agent, history, ["head_attention"]).head_attention.shape == (2, 1, 1, 4)
    assert look(agent, history, ["episodes"]) is history
