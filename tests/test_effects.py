"""What dropping history does: effects beside a slow twin, controls, chance, words and JSON."""

import json
from dataclasses import make_dataclass, replace

import numpy as np
import pytest
import torch
from agents import Recorder
from compression_cases import decisions_of, make_history
from hypothesis import given
from hypothesis import strategies as st

from historylens.common.errors import UserError
from historylens.compression import METHODS
from historylens.effects import STANDARD, measure_effects
from historylens.effects.effect import UNMOVED, Effect, budgets, enough, has_own_size, kl_divergence
from historylens.effects.measure import DRAWN, N_DRAWS, ignores_history, spread
from historylens.effects.report import effect_line
from historylens.insights.patterns import PATTERNS

ALL = tuple(PATTERNS)
CONTROLS = ["empty", "other-task", "shuffled-rewards"]
Told = make_dataclass("Told", ["pattern", ("effect", str, None)])  # what effects see of an Insight


def weights(history):
    """How much a model reads each transition `(B, n)`: the rewarded ones most."""
    return 0.2 + 2 * history.rewards.double() + 0.1 * history.states.double().sum(-1)


def reading(history):
    """Logits `(B, 3)` of that model."""
    taken = torch.nn.functional.one_hot(history.actions.long(), 3).double()
    own = history.query_states.double().sum(-1)[:, None]
    return (taken * weights(history)[..., None]).sum(1) * 1.2 + own


def attention(history):
    """The query's attention of that model; the query itself weighs 1."""
    return weights(history) / (1 + weights(history).sum(1, keepdim=True))


def agent(n=20, logits=reading, decisions=None):
    planted = Recorder(n, logits, attention)
    planted.decisions = decisions or decisions_of(make_history(6, n, seed=3))
    return planted


def effects(patterns=ALL, seed=0, n_samples=6, **given):
    insights = [Told(pattern) for pattern in patterns]
    return measure_effects(agent(**given), [0], [[0]], insights, n_samples, seed)


@pytest.fixture(scope="module")
def short():
    return effects()


@pytest.fixture(scope="module")
def longer():
    return effects(n=40)


# Numbers


def test_effects_equal_decisions_made_one_by_one(short):
    assert set(short.curves) >= {*STANDARD, "diverse", "k-medoids", "landmark", "centroids"}
    for name in set(short.curves) - set(DRAWN):
        for effect in short.curves[name]:
            shifts, flips, kept = [], [], []
            for b in range(6):
                history = agent().history([b])
                history = replace(history, query_attention=attention(history).float())
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
    full = torch.zeros(4, 2)
    moved = torch.arange(8.0)  # two draws
    logits = torch.stack([-moved, moved], dim=1)
    effect = Effect.of(full, logits, 3, torch.tensor([1, 2, 3, 3] * 2))
    values = kl_divergence(full.repeat(2, 1), logits).view(2, 4).numpy()
    assert (effect.kept_mean, effect.kept_min, effect.kept_max) == (2.25, 1, 3)
    assert effect.flips == 7 / 8
    assert (effect.kl_mean, effect.kl_p95) == (values.mean(), np.percentile(values, 95))
    low, high = effect.draws
    np.testing.assert_allclose([low, high], values.mean(axis=1))
    assert effect.kl_band == pytest.approx([0.95 * low + 0.05 * high, 0.05 * low + 0.95 * high])
    assert effect.flips_band == pytest.approx([0.75 + 0.05 * 0.25, 1 - 0.05 * 0.25])
    assert Effect.of(full, logits[:4], 3, torch.ones(4)).kl_band is None


def test_the_divergence_of_a_known_pair():
    full, other = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log() + 3
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kl_divergence(full, other).item() == pytest.approx(expected, abs=1e-6)
    assert kl_divergence(full, full).item() == 0


def test_what_keeps_as_many_as_it_needs_is_beside_as_many_drawn_at_random(short):
    for name in ("prune-low", "top-30", "threshold"):
        (own,) = short.curves[name]
        for part in ("kept_mean", "kept_min", "kept_max"):
            assert getattr(own.random, part) == getattr(own, part)
        assert len(own.random.draws) == N_DRAWS
    top, pruned = short.curves["top-30"][0], short.curves["prune-low"][0]
    assert (top.kept_min, top.kept_max) == (6, 6)
    assert pruned.kept_min < pruned.kept_max


def test_what_is_random_is_drawn_several_times_and_the_same_for_the_same_seed(short):
    same, other = effects(["recency", "focused"]), effects(["recency", "focused"], seed=1)
    for name, n_draws in {"random": N_DRAWS, "decay": 5, "importance": 5}.items():
        for a, b, c in zip(short.curves[name], same.curves[name], other.curves[name], strict=True):
            assert len(set(a.draws)) == len(a.draws) == n_draws
            np.testing.assert_array_equal(a.draws, b.draws)
            assert not np.array_equal(a.draws, c.draws)


def test_what_else_is_measured_changes_no_number(short):
    alone = effects([])
    assert set(alone.curves) == {*STANDARD, "random"}
    for name, curve in alone.curves.items():
        assert [one.json() for one in curve] == [one.json() for one in short.curves[name]]


def test_large_batches_are_cut_without_changing_a_number(short, monkeypatch):
    monkeypatch.setattr("historylens.agent.MAX_TOKENS_ACTING", 50)
    assert json.dumps(effects().json) == json.dumps(short.json)


def test_histories_longer_than_the_model_reads_count_up_to_their_latest():
    history = make_history(6, 11, seed=3)
    found = effects([], n=8, decisions=decisions_of(history))
    cut = decisions_of(history.latest(8))
    assert json.dumps(found.json) == json.dumps(effects([], n=8, decisions=cut).json)


# What is measured


def test_everything_that_patterns_advise_is_measured(short):
    for pattern in PATTERNS.values():
        assert {*pattern.measured, pattern.headline[0]} <= set(short.curves)


def test_sizes_are_those_of_the_examples_and_spread_evenly_on_a_log_axis():
    assert budgets(99) == [1, 2, 5, 10, 20, 30, 50]
    assert budgets(239) == [1, 2, 5, 10, 20, 50, 72, 100]
    assert [budgets(n) for n in (1, 2, 3)] == [[], [1], [1]]


@given(st.integers(2, 5000))
def test_sizes_ascend_below_the_context(n):
    sizes = budgets(n)
    assert sizes == sorted(set(sizes))
    assert 1 == sizes[0] <= sizes[-1] < n
    assert -(-3 * n // 10) in sizes


@given(st.integers(1, 300), st.integers(1, 300))
def test_decisions_are_spread_evenly(n_samples, n_wanted):
    chosen = spread(n_samples, n_wanted)
    assert len(chosen) == min(n_samples, n_wanted)
    gaps = np.diff([-1 - chosen[0], *chosen, 2 * n_samples - 1 - chosen[-1]])
    assert gaps.min() > 0
    assert np.ptp(gaps[1:-1]) <= 1 if len(chosen) > 2 else True


def test_decisions_are_those_of_the_length_that_most_have():
    lengths = (4, 9, 9, 4, 9, 6)
    parts = [decisions_of(make_history(1, n, seed=i))[0] for i, n in enumerate(lengths)]
    found = effects([], n_samples=2, n=9, decisions=parts)
    assert found.n == 9
    assert len(found.samples) == 2
    assert set(found.samples) <= {1, 2, 4}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_contexts(n):
    found = effects(n=n)
    assert not found.ignores_history
    for pattern in ALL:
        assert ("nothing to choose from" in effect_line(found, pattern)) == (n == 1)
    assert json.dumps(found.json, allow_nan=False)
    assert found.text


# Controls


def imitating(history):
    return torch.nn.functional.one_hot(history.actions.long(), 3).double().sum(1)


def counting(history):
    return torch.tensor([[1.0, history.n / 5, 0.0]]).expand(history.size, -1)


@pytest.mark.parametrize(
    ("logits", "unmoved_by"),
    [(reading, []), (imitating, ["shuffled-rewards"]), (counting, CONTROLS[1:])],
)
def test_a_model_that_reads_its_history_somehow_is_judged(logits, unmoved_by):
    found = effects([], logits=logits)
    assert list(found.controls) == CONTROLS
    assert [name for name, one in found.controls.items() if one.kl_mean == 0] == unmoved_by
    assert not found.ignores_history
    assert not found.not_run


def test_no_choice_is_better_than_another_to_a_model_that_counts_transitions():
    found = effects([], logits=counting)
    for one in (one for name in STANDARD for one in found.curves[name]):
        assert one.kl_mean == pytest.approx(one.random.kl_mean)


def test_a_model_that_ignores_its_history_is_not_judged():
    def ignoring(history):
        return torch.stack([history.query_states[:, 0] == i for i in range(3)], 1).double()

    found = effects(["recency"], logits=ignoring)
    assert found.ignores_history
    assert found.json["ignores_history"] is True
    assert found.json["strategies"] == {}
    assert found.picture is found.faithfulness is found.json["faithfulness"] is None
    words = "No compression can be judged: over 6 decisions the model ignores its history"
    for text in (effect_line(found, "recency"), found.text):
        assert words in " ".join(text.split())
    assert "GUIDE" not in found.text


def moved(*draws, n_keep=5, random=None):
    """An effect with these mean divergences, one a draw."""
    values = (n_keep, n_keep, n_keep, n_keep, 1, 0.0, float(np.mean(draws)), 0.0, None, None)
    return Effect(*values, draws=np.array(draws), random=random)


def test_without_other_tasks_the_empty_history_has_to_be_as_close():
    near, far = moved(UNMOVED), moved(2 * UNMOVED)
    assert ignores_history({"empty": far, "other-task": near})
    assert not ignores_history({"empty": far})
    assert ignores_history({"empty": near})
    assert not ignores_history({"empty": near, "other-task": far})
    assert not ignores_history({"empty": near, "other-task": near, "shuffled-rewards": far})
    assert not ignores_history({})


def unrewarded(decision):
    return replace(decision, rewards=np.zeros_like(decision.rewards))


def test_a_model_that_reads_rewards_alone_is_judged_by_those_decisions_that_have_any():
    def rewarded(history):
        spots = (history.rewards * torch.arange(history.n)).sum(1)
        return torch.nn.functional.one_hot(spots.long() % 3, 3).double() * 4

    first, *rest = agent().decisions
    found = effects([], logits=rewarded, decisions=[first, *map(unrewarded, rest)])
    assert found.controls["shuffled-rewards"].n_decisions == 1
    assert not found.ignores_history


def test_controls_that_cannot_be_run_say_why_and_the_empty_history_stands_in():
    one_task = [replace(unrewarded(decision), task=7) for decision in agent().decisions]
    found = effects([], decisions=one_task)
    assert set(found.controls) == {"empty"}
    assert found.not_run["other-task"] == "all decisions are of one task"
    assert "different rewards" in found.not_run["shuffled-rewards"]
    assert not found.ignores_history
    assert "another task's history: could not be run" in found.text

    constant = lambda history: torch.ones(history.size, 3)  # noqa: E731
    assert effects([], decisions=one_task, logits=constant).ignores_history


def at_least(n):
    def logits(history):
        if history.n < n:
            raise UserError(f"act() wants {n} transitions")
        return reading(history)

    return logits


def test_a_model_that_cannot_act_without_history_is_measured_all_the_same():
    found = effects([], logits=at_least(1))
    assert found.not_run["empty"] == "act() wants 1 transitions"
    assert found.curves["recent"]
    assert found.picture["empty"] is None


def out_of_memory(history):
    if history.n < 20:
        raise torch.OutOfMemoryError
    return reading(history)


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (
            at_least(20),
            "not measured, the model cannot be run on less history. act() wants 20 transitions",
        ),
        (out_of_memory, "not measured, cpu ran out of memory."),
    ],
)
def test_why_nothing_could_be_measured_is_told(logits, reason):
    found = effects(["recency"], logits=logits)
    assert " ".join(found.text.split()) == f"EFFECT OF DROPPING HISTORY: {reason}"
    assert found.json == {"not_measured": reason}
    assert found.picture is None
    assert found.attached([Told("recency")]) == [Told("recency")]


def test_another_error_is_none_of_the_models_limits():
    def broken(history):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        effects(logits=broken)


def test_nothing_is_measured_and_nothing_said_where_it_was_not_asked_for():
    found = effects(n_samples=0)
    assert (found.text, found.json, found.picture) == ("", None, None)


# Against chance


def test_better_than_random_is_better_than_every_draw():
    random = moved(0.2, 0.5, 0.4)
    verdicts = [moved(x, random=random).against_random for x in (0.1, 0.2, 0.45, 0.5, 0.6)]
    assert verdicts == ["better", "alike", "alike", "alike", "worse"]


def test_enough_is_the_size_from_which_on_all_is_well():
    ladder = [moved(x, n_keep=i) for i, x in enumerate((9, 0, 9, UNMOVED, 0))]
    assert enough(ladder) == 3
    assert enough(ladder[:3]) is None
    assert enough(ladder[1:2]) == 1


# Words and JSON


def test_the_line_of_an_insight_has_the_numbers_of_the_json(longer):
    strategies = longer.json["strategies"]
    cases = {"recency": ("recent", 10), "uniform": ("even", 10), "sparse": ("top-k", 5)}
    for pattern, (name, n_keep) in cases.items():
        own, random, worst = (
            next(s for s in strategies[one]["sizes"] if s["n_keep"] == n_keep)
            for one in (name, "random", "least-attended")
        )
        text = effect_line(longer, pattern)
        assert f"{n_keep}" in text.split(" of 40 transitions")[0]
        assert f"action in {own['flips']:.0%} of 6 decisions (KL {own['kl_mean']:.2f}" in text
        low, high = random["flips_band"]
        assert f"{random['flips']:.0%} ({low:.0%} to {high:.0%} over 20 draws" in text
        assert f"the {n_keep} least attended: {worst['flips']:.0%}" in text
        verdict = {"better": "Better than each", "worse": "Worse than each", "alike": "than random"}
        assert verdict[own["against_random"]] in text
    assert "the 12 most attended of 40" in effect_line(longer, "focused")


def test_the_line_names_all_else_that_is_advised(longer):
    for pattern, about in PATTERNS.items():
        words = effect_line(longer, pattern).replace(",", "").split()
        assert {*about.measured} - {about.headline[0]} <= {*words}


def test_the_last_insight_of_each_pattern_tells_what_its_advice_did(longer):
    insights = [Told("recency"), Told("sparse"), Told("recency")]
    attached = longer.attached(insights)
    assert [one.effect is None for one in attached] == [True, False, False]
    assert attached[2].effect == effect_line(longer, "recency")


def test_the_json_holds_all_that_the_picture_shows(short):
    values = json.loads(json.dumps(short.json, allow_nan=False))
    assert values["settings"]["samples"] == list(range(6))
    assert values["strategies"]["top-k"]["advised_by"] == ["focused", "sparse"]
    for name, curve in short.curves.items():
        sizes = values["strategies"][name]["sizes"]
        for size, one in zip(sizes, curve, strict=True):
            for part in ("n_keep", "flips", "kl_mean", "kl_p95", "kept_mean", "n_decisions"):
                assert size[part] == vars(one)[part]
            assert size.get("kl_band") == one.kl_band
            assert (one.kl_band is not None) == (name in DRAWN)
            assert size.get("against_random") == one.against_random
            assert ("random" in size) == has_own_size(name)
        assert ("enough" in values["strategies"][name]) != has_own_size(name)
    size = values["strategies"]["prune-low"]["sizes"][0]
    assert size["random"]["kl_band"] == short.curves["prune-low"][0].random.kl_band
    assert short.picture["strategies"] == values["strategies"]
    assert short.picture["empty"] == values["controls"]["empty"]
    assert (short.picture["n_context"], short.picture["worst"]) == (20, "least-attended")


def test_the_table_fits_the_console_and_starts_with_the_least_harmful(longer):
    lines = longer.text.splitlines()
    assert max(map(len, lines)) <= 100
    curves = {n: curve for n, curve in longer.curves.items() if not has_own_size(n)}
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(curves)]}
    assert set(rows) == set(curves)
    harm = [np.mean([one.kl_mean for one in curves[name]]) for name in rows]
    assert harm == sorted(harm)
    assert [cell.rstrip("+-") for cell in rows["recent"].split() if "%" in cell] == [
        f"{one.flips:.0%}" for one in curves["recent"]
    ]
    assert any(line.startswith("prune-low keeps ") for line in lines)
