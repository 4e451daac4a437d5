"""What dropping history does: effects beside a slow twin, controls, and what cannot be run."""

import json
from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from agents import Recorder
from compression_cases import decisions_of, make_history
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm
from wired import copied

from historylens.agent import run_heads
from historylens.common.errors import UserError
from historylens.compression import METHODS
from historylens.effects import STANDARD, measure_effects
from historylens.effects.measure import Effect, Trial, budgets, has_own_size, spread
from historylens.effects.report import UNMOVED, MeasuredEffects
from historylens.insights.patterns import PATTERNS

BAR = tqdm(disable=True)
CONTROLS = ["empty", "other-task", "shuffled-rewards"]
DRAWN = {"random": 20, "decay": 5, "importance": 5}  # how often
Told = make_dataclass("Told", ["pattern", ("effect", str, None)])  # what effects see of an Insight


def weights(history):
    """How much a model reads each transition `(B, n)`: the rewarded ones most."""
    return 0.2 + 2 * history.rewards.double() + 0.1 * history.states.double().sum(-1)


def attention(history):
    """The query's attention of that model; the query itself weighs 1."""
    return weights(history) / (1 + weights(history).sum(1, keepdim=True))


def one_hot(values):
    return torch.nn.functional.one_hot(values.long(), 3).double()


def reading(history):
    """Logits `(B, 3)` of that model."""
    own = history.query_states.double().sum(-1)[:, None]
    return (one_hot(history.actions) * weights(history)[..., None]).sum(1) * 1.2 + own


def at_least(n, error=UserError):
    def logits(history):
        if history.n < n:
            raise error(f"act() wants {n} transitions")
        return reading(history)

    return logits


def agent(n=24, logits=reading, decisions=None):
    planted = Recorder(n, logits, attention)
    planted.decisions = decisions or decisions_of(make_history(6, n, seed=3))
    return planted


def effects(patterns=tuple(PATTERNS), seed=0, n_samples=6, **given):
    insights = [Told(pattern) for pattern in patterns]
    return measure_effects(agent(**given), [0], [[0]], insights, n_samples, seed, BAR)


@pytest.fixture(scope="module")
def whole():
    return effects()


NOT_SHOWN = {"norm", "contribution"}  # by a model without a projection
NO_SHARES = {"norm and contribution": "tiny: expected heads side by side before a linear "
             "projection, as contributions take, got none"}  # fmt: skip


def test_effects_equal_decisions_made_one_by_one(whole):
    histories = []
    for b in range(6):
        bare = agent().history([b])
        own = attention(bare).float()
        histories.append(replace(bare, query_attention=own, head_attention=own[:, None, None]))
    for name in set(whole.curves) - set(DRAWN):
        for effect in whole.curves[name]:
            shifts, flips, kept = [], [], []
            for history in histories:
                ((_, shorter),) = METHODS[name].compress(history, effect.n_keep).by_count()
                p, q = (torch.softmax(reading(h)[0], 0).numpy() for h in (history, shorter))
                shifts.append((p * np.log(p / q)).sum())
                flips.append(p.argmax() != q.argmax())
                kept.append(shorter.n)
            assert (effect.n_decisions, effect.flips) == (6, np.mean(flips))
            assert effect.kl_mean == pytest.approx(np.mean(shifts), abs=1e-9)
            assert effect.kl_p95 == pytest.approx(np.percentile(shifts, 95), abs=1e-9)
            about = (effect.kept_mean, effect.kept_min, effect.kept_max)
            assert about == (np.mean(kept), min(kept), max(kept))
            assert has_own_size(name) or kept == [effect.n_keep] * 6


def test_an_effect_sums_up_decisions_and_draws():
    kept = torch.tensor([[-1, -1, 2], [-1, 1, 2], [0, 1, 2], [0, 1, 2]] * 2)
    shorter = replace(make_history(8, 3), tasks=torch.arange(8), kept=kept)
    planted = agent(logits=lambda h: torch.stack([-h.tasks, h.tasks], dim=1).double())
    trial = SimpleNamespace(agent=planted, beta=1.0)
    effect = Trial.effect(trial, torch.zeros(4, 2), shorter, n_keep=3)
    values = np.log(np.cosh(np.arange(8)))  # of KL(even || softmax of -x and x)
    assert (effect.kept_mean, effect.kept_min, effect.kept_max, effect.flips) == (2.25, 1, 3, 7 / 8)
    assert effect.kl_mean == pytest.approx(values.mean())
    assert effect.kl_p95 == pytest.approx(np.percentile(values, 95))
    low, high = effect.draws
    assert (low, high) == pytest.approx((values[:4].mean(), values[4:].mean()))
    assert effect.kl_band == pytest.approx([0.95 * low + 0.05 * high, 0.05 * low + 0.95 * high])
    assert effect.flips_band == pytest.approx([0.75 + 0.05 * 0.25, 1 - 0.05 * 0.25])


def test_what_keeps_as_many_as_it_needs_is_beside_as_many_drawn_at_random(whole):
    kept = {}
    for name in ("prune-low", "top-30", "threshold"):
        (own,) = whole.curves[name]
        kept[name], beside = ((x.kept_mean, x.kept_min, x.kept_max) for x in (own, own.random))
        assert (beside, len(own.random.draws)) == (kept[name], 20)
    assert kept["top-30"] == (8, 8, 8)
    assert kept["prune-low"][1] < kept["prune-low"][2]


def test_what_is_measured_besides_and_the_size_of_batches_change_no_number(whole, monkeypatch):
    monkeypatch.setattr("historylens.agent.MAX_TOKENS_ACTING", 50)
    patterns = ["recency", "focused"]
    part, other = (effects(patterns, seed=seed) for seed in (0, 1))
    for found, advised in ((part, patterns), (whole, PATTERNS), (effects([]), [])):
        measured = {name for pattern in advised for name in PATTERNS[pattern].measured}
        measured |= {*STANDARD, "random", "head-0-0"}
        assert set(found.curves) == measured - NOT_SHOWN
    for name in ("controls", "guide", "heads", "knockout"):
        assert part.json[name] == whole.json[name] is not None
    assert part.guide != other.guide
    for name, curve in part.curves.items():
        for a, b, c in zip(curve, whole.curves[name], other.curves[name], strict=True):
            assert (a.json(), *a.draws) == (b.json(), *b.draws)
            assert len(set(a.draws)) == len(a.draws) == DRAWN.get(name, 1)
            assert np.array_equal(a.draws, c.draws) == (name not in DRAWN)


def test_decisions_are_those_of_the_length_that_most_have_up_to_what_the_model_reads():
    parts = [decisions_of(make_history(1, n, seed=n))[0] for n in (4, 9, 9, 4, 9, 6)]
    found = effects([], n_samples=2, n=9, decisions=parts)
    assert (found.n, len(found.samples), set(found.samples) <= {1, 2, 4}) == (9, 2, True)
    history = make_history(6, 11, seed=3)
    all_of_it, cut = (effects([], n=8, decisions=decisions_of(history.latest(n))) for n in (11, 8))
    assert json.dumps(all_of_it.json) == json.dumps(cut.json)


@given(st.integers(2, 5000))
def test_sizes_are_spread_on_a_log_axis_and_30_percent_is_among_them(n):
    ladder = {size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if size <= 0.6 * n}
    assert budgets(n) == sorted(ladder | {-(-3 * n // 10)})


@given(st.integers(1, 300), st.integers(1, 300))
def test_decisions_are_spread_evenly(n_samples, n_wanted):
    chosen = spread(n_samples, n_wanted)
    assert len(chosen) == min(n_samples, n_wanted)
    gaps = np.diff([-1 - chosen[0], *chosen, 2 * n_samples - 1 - chosen[-1]])
    assert gaps.min() > 0
    assert np.ptp(gaps[1:-1]) <= 1 if len(chosen) > 2 else True


@pytest.mark.parametrize(("n", "sizes"), [(1, []), (2, [1])])
def test_short_contexts(n, sizes):
    found = effects(n=n)
    assert budgets(n) == sizes
    assert not found.ignores_history
    for pattern in PATTERNS:
        assert ("nothing to choose from" in found.line(pattern)) == (n == 1)
    assert json.dumps(found.json, allow_nan=False)
    assert found.text


def test_decisions_without_history_say_nothing_of_it():
    none, some = (decisions_of(make_history(size, n, seed=3)) for size, n in ((6, 0), (2, 4)))
    said = "EFFECT OF DROPPING HISTORY: not measured, no decision has a history."
    assert effects(decisions=none).text == said
    found = effects(decisions=none + some)
    assert (found.n, list(found.samples)) == (4, [6, 7])


def counting(history):
    return torch.tensor([[1.0, history.n / 5, 0.0]]).expand(history.size, -1)


@pytest.mark.parametrize(("logits", "unmoved_by"), [
    (reading, []),
    (lambda history: one_hot(history.actions).sum(1), ["shuffled-rewards"]),
    (counting, ["other-task", "shuffled-rewards"]),
])  # fmt: skip
def test_a_model_that_reads_its_history_somehow_is_judged(logits, unmoved_by):
    found = effects([], logits=logits)
    assert list(found.controls) == CONTROLS
    assert [name for name, one in found.controls.items() if one.kl_mean == 0] == unmoved_by
    assert not found.ignores_history
    assert found.not_run == NO_SHARES | {"twins": "it has no weight matrices"}
    if logits is counting:  # no choice is better than another
        for one in [one for name in set(STANDARD) - NOT_SHOWN for one in found.curves[name]]:
            assert one.kl_mean == pytest.approx(one.random.kl_mean)


def moved(*draws, n_keep=5, random=None):
    """An effect with these mean divergences, one a draw."""
    mean = float(np.mean(draws))
    values = (n_keep, n_keep, n_keep, n_keep, 1, 0.0, mean, 0.0, None, None, mean, mean)
    return Effect(*values, draws=np.array(draws), random=random)


def only(changed, flips):
    return {"other-task": (changed, flips)}


@pytest.mark.parametrize(("ignores", "controls", "twins"), [  # of 5 actions
    (True, {"empty": (2 * UNMOVED, 0), "other-task": (UNMOVED, 0)}, []),
    (False, {"empty": (UNMOVED, 0), "other-task": (2 * UNMOVED, 0)}, []),
    (False, only(UNMOVED, 0) | {"shuffled-rewards": (2 * UNMOVED, 0)}, []),
    (True, {"empty": (UNMOVED, 0)}, []),
    (False, {"empty": (2 * UNMOVED, 0)}, []),  # without other tasks it has to be as close
    (False, {}, []),
    (True, only(UNMOVED, UNMOVED), []),
    (False, only(UNMOVED, 2 * UNMOVED), []),
    (False, only(0.5, 0.5), [0.1] * 18 + [0.4]),
    (True, only(0.5, 0.5), [0.1] * 18 + [0.5]),
    (False, only(0.5, 0.9), [0.1] * 18 + [0.6]),  # as many as if decisions were drawn anew
    (False, only(0.03, 0.0), [0.01] * 19),
])  # fmt: skip
def test_the_history_is_used_where_it_moves_some_and_more_than_in_every_twin(
    ignores, controls, twins
):
    controls = {k: replace(moved(0), changed=c, flips=f) for k, (c, f) in controls.items()}
    found = MeasuredEffects(controls=controls, n_actions=5, twins=twins)
    assert found.ignores_history is ignores


def test_a_model_that_reads_rewards_alone_is_judged_by_those_decisions_that_have_any():
    def rewarded(history):
        return one_hot((history.rewards * torch.arange(history.n)).sum(1) % 3) * 4

    first, *rest = agent().decisions
    unrewarded = [replace(decision, rewards=[0] * 24) for decision in rest]
    found = effects([], logits=rewarded, decisions=[first, *unrewarded])
    assert found.controls["shuffled-rewards"].n_decisions == 1
    assert not found.ignores_history


def test_controls_that_cannot_be_run_say_why_and_the_empty_history_stands_in():
    one_task = [replace(decision, rewards=[0] * 24, task=7) for decision in agent().decisions]
    found = effects([], decisions=one_task)
    assert set(found.controls) == {"empty"}
    assert found.not_run["other-task"] == "all decisions are of one task"
    assert "different rewards" in found.not_run["shuffled-rewards"]
    assert "another task's history: could not be run" in found.text
    constant = effects([], decisions=one_task, logits=lambda history: torch.ones(history.size, 3))
    assert (found.ignores_history, constant.ignores_history) == (False, True)
    assert "no history at all changes 0%: 5% count as nothing." in " ".join(constant.text.split())


def test_what_a_model_cannot_read_is_told_and_all_else_is_measured():
    """Of no history, or of states that are no whole numbers."""

    def logits(history):
        if history.states.is_floating_point():
            raise UserError("act() wants whole numbers")
        return at_least(1)(history)

    found = effects(["sparse", "uniform"], n=40, logits=logits)  # no weight is above 0.1
    assert found.not_run.pop("twins") == "it has no weight matrices"
    without = dict.fromkeys(("empty", "threshold"), "act() wants 1 transitions")
    assert found.not_run == without | NO_SHARES | {"centroids": "act() wants whole numbers"}
    assert "threshold: could not be run, act() wants 1 transitions." in found.text
    assert {"recent", "even", "k-medoids", "random"} <= found.curves.keys()
    assert "centroids" not in found.curves
    assert found.curves_picture["empty"] is None


@pytest.mark.parametrize(("error", "reason"), [
    (UserError, "the model cannot be run on less history. act() wants 20 transitions"),
    (torch.OutOfMemoryError, "cpu ran out of memory."),
])  # fmt: skip
def test_why_nothing_could_be_measured_is_told_and_nothing_where_it_was_not_asked_for(
    error, reason
):
    found = effects(["recency"], logits=at_least(20, error))
    assert " ".join(found.text.split()) == f"EFFECT OF DROPPING HISTORY: not measured, {reason}"
    assert found.json == {"not_measured": f"not measured, {reason}"}
    assert found.curves_picture is found.heads_picture is None
    assert found.attached([Told("recency")]) == [Told("recency")]
    unasked = effects(n_samples=0)
    assert (unasked.text, unasked.json, unasked.curves_picture) == ("", None, None)
    with pytest.raises(RuntimeError, match="act"):  # another error is none of the model's limits
        effects(logits=at_least(20, RuntimeError))


def test_of_layers_whose_heads_cannot_be_told_apart_nothing_is_said(monkeypatch):
    def first_alone(*args):
        logits, seen = run_heads(*args)
        return logits, {0: seen[0]}

    monkeypatch.setattr("historylens.effects.inside.run_heads", first_alone)
    both, second = (
        measure_effects(copied(), x, [[0]] * len(x), [], 6, 0, BAR) for x in ([0, 1], [1])
    )
    assert {one["layer"] for one in both.heads["heads"]} == {0}
    assert "The heads of layer 1 cannot be told apart: left out." in both.text
    assert (second.heads, second.heads_picture) == (None, None)
    assert "heads side by side" in second.not_run["heads"]
    assert "where heads are told apart" in second.not_run["knockout"]
    assert second.guide
