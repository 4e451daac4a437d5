"""What dropping history does: outcomes beside a slow twin, controls, chance, words and JSON."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from compression_cases import make_history
from hypothesis import given
from hypothesis import strategies as st

from acting.views import ModelView
from attention.advice import PATTERNS
from compression import CONTROLS, MERGES, STRATEGIES, History, get_strategy
from config import UserError
from effects import measure as module
from effects.content import effects_json, picture
from effects.dropping import measure_dropping
from effects.measure import (
    ADVISED,
    N_DRAWS,
    STANDARD,
    budgets,
    ignores_history,
    measure_effects,
    spread,
)
from effects.outcomes import UNMOVED, Outcome, against_random, enough
from effects.report import effect_line, effects_block

ALL = tuple(PATTERNS)


def reading(history: History) -> torch.Tensor:
    """Logits `(B, 3)` of a model that reads every transition, the rewarded ones most."""
    taken = torch.nn.functional.one_hot(history.actions.long(), 3).double()
    weights = 0.2 + 2 * history.rewards.double() + 0.1 * history.states.double().sum(-1)
    return (taken * weights[..., None]).sum(1) * 1.2 + history.query_states.double().sum(-1)[
        :, None
    ]


def attending(history, wanted):
    """The query's attention of that model."""
    weights = 0.2 + 2 * history.rewards.double() + 0.1 * history.states.double().sum(-1)
    return {"query_attention": (weights / (1 + weights.sum(1, keepdim=True))).float()}


@dataclass(frozen=True)
class PlainSubject:
    """Decisions and a model that is a function; `histories` of equal lengths or not."""

    histories: tuple[History, ...]
    logits: object = reading
    look: object = attending
    layers: tuple = ()
    device: torch.device = torch.device("cpu")

    @property
    def n_samples(self):
        return len(self.histories)

    def shape(self, index):
        return self.histories[index].n

    def history(self, indices):
        chosen = [self.histories[i] for i in indices]
        names = ("states", "actions", "rewards", "next_states", "query_states", "tasks")
        return History(**{name: torch.cat([getattr(h, name) for h in chosen]) for name in names})

    @property
    def view(self):
        return ModelView(max(h.n for h in self.histories), self.logits, self.look)


def subject(n_samples=6, n=20, **changed):
    history = make_history(n_samples, n, seed=3)
    rows = (history.rows(torch.tensor([i])) for i in range(n_samples))
    return PlainSubject(tuple(rows), **changed)


def with_rewards(given, rewards):
    parts = (replace(h, rewards=torch.full_like(h.rewards, rewards)) for h in given.histories)
    return replace(given, histories=tuple(parts))


def kl(p, q):
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p, q))
    return float((p * np.log(p / q)).sum())


# Numbers


def test_outcomes_equal_decisions_made_one_by_one():
    given, found = subject(), measure_effects(subject(), ALL, 6, seed=0)
    names = [name for name in found.curves if name not in module.DRAWN]
    assert set(names) >= {*STANDARD, *MERGES, "diverse", "k-medoids", "landmark"}
    for name in names:
        for outcome in found.curves[name]:
            for b in range(6):
                history = given.history([b])
                history = replace(history, **attending(history, []))
                full = reading(history)[0].numpy()
                if name in MERGES:
                    shorter = MERGES[name].merge(history, outcome.n_keep)
                else:
                    shorter = history.take(STRATEGIES[name].select(history, outcome.n_keep))
                other = reading(shorter)[0].numpy()
                assert outcome.kl[0, b] == pytest.approx(kl(full, other), abs=1e-9)
                assert outcome.flips[0, b] == (full.argmax() != other.argmax())
                assert outcome.kept[0, b] == shorter.n == outcome.n_keep


def test_an_outcome_sums_up_decisions_and_draws():
    values = np.arange(8.0).reshape(2, 4)
    outcome = Outcome(3, np.array([[1, 2, 3, 3]] * 2), values, values > 5)
    assert outcome.kl_mean == 3.5
    assert outcome.kl_p95 == pytest.approx(6.65)
    assert outcome.flip_share == 0.25
    assert outcome.kept_mean == 2.25
    assert outcome.band("kl") == pytest.approx((1.5 + 0.05 * 4, 5.5 - 0.05 * 4))
    assert outcome.band("flips") == pytest.approx((0.025, 0.475))


def test_what_keeps_as_many_as_it_needs_is_beside_as_many_drawn_at_random():
    given, found = subject(), measure_effects(subject(), ["focused", "sparse"], 6, seed=0)
    assert set(found.own_size) == {"prune-low", "top-30", "threshold"}
    history = given.history(range(6))
    history = replace(history, **attending(history, []))
    for name, (own, random) in found.own_size.items():
        kept = (STRATEGIES[name].select(history, 19) >= 0).sum(1).numpy()
        assert own.kept.tolist() == [kept.tolist()]
        assert random.kept.tolist() == [kept.tolist()] * N_DRAWS
    assert found.own_size["top-30"][0].kept.tolist() == [[6] * 6]
    assert np.ptp(found.own_size["prune-low"][0].kept) > 0


def test_what_is_random_is_drawn_several_times_and_the_same_for_the_same_seed():
    one, same, other = (
        measure_effects(subject(), ["recency", "focused"], 6, seed) for seed in (0, 0, 1)
    )
    for name in ("random", "decay", "importance"):
        for a, b, c in zip(one.curves[name], same.curves[name], other.curves[name], strict=True):
            assert a.kl.shape == (N_DRAWS if name == "random" else 5, 6)
            assert len({tuple(draw) for draw in a.kl}) > 1
            np.testing.assert_array_equal(a.kl, b.kl)
            assert not np.array_equal(a.kl, c.kl)


def test_what_else_is_measured_changes_no_number():
    alone = measure_effects(subject(), [], 6, seed=0)
    beside = measure_effects(subject(), ALL, 6, seed=0)
    assert set(alone.curves) == {*STANDARD, "random"}
    for name, outcomes in alone.curves.items():
        for a, b in zip(outcomes, beside.curves[name], strict=True):
            np.testing.assert_allclose(a.kl, b.kl, atol=1e-12)


def test_large_batches_are_cut_without_changing_a_number(monkeypatch):
    whole = measure_effects(subject(), ALL, 6, seed=0)
    monkeypatch.setattr(module, "MAX_TOKENS", 50)
    cut = measure_effects(subject(), ALL, 6, seed=0)
    assert json.dumps(effects_json(cut)) == json.dumps(effects_json(whole))


def test_histories_longer_than_the_model_reads_count_up_to_their_latest():
    short = subject(n=8)
    longer = []
    for h in short.histories:
        parts = ("states", "actions", "rewards", "next_states")
        older = {name: torch.cat([getattr(h, name)[:, :3], getattr(h, name)], 1) for name in parts}
        longer.append(History(**older, query_states=h.query_states, tasks=h.tasks))

    class Limited(PlainSubject):
        @property
        def view(self):
            return ModelView(8, self.logits, self.look)

    found = measure_effects(Limited(tuple(longer)), [], 6, 0)
    assert found.n == 8
    assert found.curves["recent"][-1].kl == pytest.approx(
        measure_effects(short, [], 6, 0).curves["recent"][-1].kl
    )


# What is measured


def test_everything_that_patterns_advise_is_measured():
    found = measure_effects(subject(), ALL, 6, seed=0)
    for name, pattern in PATTERNS.items():
        advice = (*pattern.strategies, pattern.example)
        for _, names in zip(advice, ADVISED[name], strict=True):
            assert names
            for strategy in names:
                assert get_strategy(strategy).name == strategy
                assert strategy in found.curves or strategy in found.own_size


def test_sizes_are_those_of_the_examples_and_spread_evenly_on_a_log_axis():
    assert budgets(99) == (1, 2, 5, 10, 20, 30, 50)
    assert budgets(239) == (1, 2, 5, 10, 20, 50, 72, 100)
    assert [budgets(n) for n in (0, 1, 2, 3)] == [(), (), (1,), (1,)]


@given(st.integers(2, 5000))
def test_sizes_ascend_below_the_context(n):
    sizes = budgets(n)
    assert list(sizes) == sorted(set(sizes))
    assert 1 == sizes[0] <= sizes[-1] < n
    assert -(-3 * n // 10) in sizes


@given(st.integers(1, 300), st.integers(1, 300))
def test_decisions_are_spread_evenly(n_samples, n_wanted):
    chosen = spread(n_samples, n_wanted)
    assert len(chosen) == len(set(chosen)) == min(n_samples, n_wanted)
    assert 0 <= chosen[0] <= chosen[-1] < n_samples
    gaps = np.diff([-1 - chosen[0], *chosen, 2 * n_samples - 1 - chosen[-1]])
    assert np.ptp(np.diff(chosen)) <= 1 if len(chosen) > 2 else gaps.min() > 0


def test_decisions_are_those_of_the_length_that_most_have():
    lengths = (4, 9, 9, 4, 9, 6)
    parts = tuple(make_history(1, n, seed=i) for i, n in enumerate(lengths))
    found = measure_effects(PlainSubject(parts), [], 2, seed=0)
    assert found.n == 9
    assert set(found.samples) <= {1, 2, 4}
    assert len(found.samples) == 2


def test_without_a_look_at_attention_what_needs_it_is_left_out_and_said():
    found = measure_effects(subject(look=None), ALL, 4, seed=0)
    assert "recent" in found.curves
    assert "top-k" not in found.curves
    assert "cannot be looked into" in found.not_run["top-k"]
    assert "cannot be looked into" in effect_line(found, "sparse")
    assert "least attended" not in effect_line(found, "recency")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_contexts(n):
    found = measure_effects(subject(n=n), ALL, 6, seed=0)
    assert not found.ignores_history
    for pattern in ALL:
        text = effect_line(found, pattern)
        assert ("nothing to choose from" in text) == (n == 1)
    assert json.dumps(effects_json(found), allow_nan=False)
    assert effects_block(found)


# Controls


def test_a_model_that_reads_its_history_passes_the_controls():
    found = measure_effects(subject(), [], 6, seed=0)
    assert set(found.controls) == {"empty", *CONTROLS}
    assert not found.ignores_history
    assert not found.not_run


def test_a_model_that_ignores_its_history_is_not_judged():
    def ignoring(history):
        return torch.stack([history.query_states[:, 0] == i for i in range(3)], 1).double()

    found = measure_effects(subject(logits=ignoring), ["recency"], 6, seed=0)
    assert found.ignores_history
    assert not found.curves
    assert not found.own_size
    for text in (effect_line(found, "recency"), effects_block(found)):
        assert "No compression can be judged: over 6 decisions the model ignores its history" in (
            " ".join(text.split())
        )
    assert effects_json(found)["ignores_history"] is True


def test_a_model_that_counts_transitions_is_judged_and_no_choice_is_better_than_another():
    def counting(history):
        return torch.tensor([[1.0, history.n / 5, 0.0]]).expand(history.size, -1)

    found = measure_effects(subject(logits=counting), [], 6, seed=0)
    assert found.controls["other-task"].kl_mean == 0
    assert not found.ignores_history
    for name in STANDARD:
        for one, random in zip(found.curves[name], found.curves["random"], strict=True):
            assert one.kl_mean == pytest.approx(random.kl_mean)


def test_without_other_tasks_the_empty_history_has_to_be_as_close():
    near, far = (replace(outcome(x), n_keep=0) for x in (UNMOVED, 2 * UNMOVED))
    assert ignores_history({"empty": far, "other-task": near})
    assert not ignores_history({"empty": far})
    assert ignores_history({"empty": near})
    assert not ignores_history({"empty": near, "other-task": far})
    assert not ignores_history({"empty": near, "other-task": near, "shuffled-rewards": far})
    assert not ignores_history({})


def test_a_model_that_reads_no_reward_still_reads_its_history():
    def imitating(history):
        return torch.nn.functional.one_hot(history.actions.long(), 3).double().sum(1)

    found = measure_effects(subject(logits=imitating), [], 6, seed=0)
    assert found.controls["shuffled-rewards"].kl_mean == 0
    assert not found.ignores_history


def test_a_model_that_reads_rewards_alone_is_judged_by_those_decisions_that_have_any():
    def rewarded(history):
        spots = (history.rewards * torch.arange(history.n)).sum(1) if history.n else torch.zeros(6)
        return torch.nn.functional.one_hot(spots.long() % 3, 3).double() * 4

    given = subject(logits=rewarded)
    few = replace(given, histories=given.histories[:1] + with_rewards(given, 0).histories[1:])
    found = measure_effects(few, [], 6, seed=0)
    assert found.controls["shuffled-rewards"].kl.shape == (1, 1)
    assert not found.ignores_history


def test_controls_that_cannot_be_run_say_why_and_the_empty_history_stands_in():
    given = with_rewards(subject(), 0)
    one_task = tuple(replace(h, tasks=torch.tensor([7])) for h in given.histories)
    found = measure_effects(replace(given, histories=one_task), [], 6, seed=0)
    assert set(found.controls) == {"empty"}
    assert found.not_run["other-task"] == "all decisions are of one task"
    assert "different rewards" in found.not_run["shuffled-rewards"]
    assert not found.ignores_history
    assert "another task's history: could not be run" in effects_block(found)

    constant = lambda history: torch.ones(history.size, 3)  # noqa: E731
    found = measure_effects(replace(given, histories=one_task, logits=constant), [], 6, seed=0)
    assert found.ignores_history


def test_a_model_that_cannot_act_without_history_is_measured_all_the_same():
    def demanding(history):
        if not history.n:
            raise UserError("act() wants history")
        return reading(history)

    found = measure_effects(subject(logits=demanding), ["recency"], 6, seed=0)
    assert found.not_run["empty"] == "act() wants history"
    assert found.curves["recent"]
    assert picture(effects_json(found))["empty"] is None


def test_a_model_that_cannot_run_on_less_history_is_told_so():
    def rigid(history):
        if history.n < 20:
            raise UserError("act() wants 20 transitions")
        return reading(history)

    class Analysis:
        subject = globals()["subject"](logits=rigid)

    found = measure_dropping(Analysis, [], 6, seed=0)
    assert "act() wants 20 transitions" in " ".join(found.text.split())
    assert "act() wants 20 transitions" in found.content["not_measured"]
    assert not found.is_drawn


# Against chance


def outcome(*draws):
    values = np.array(draws, dtype=float)[:, None]
    return Outcome(5, np.full(values.shape, 5), values, values > 1)


def test_better_than_random_is_better_than_every_draw():
    random = outcome(0.2, 0.5, 0.4)
    found = [against_random(outcome(x), random) for x in (0.1, 0.2, 0.45, 0.5, 0.6)]
    assert found == ["better", "alike", "alike", "alike", "worse"]


def test_enough_is_the_size_from_which_on_all_is_well():
    ladder = [replace(outcome(x), n_keep=i) for i, x in enumerate((9, 0, 9, UNMOVED, 0))]
    assert enough(ladder) == 3
    assert enough(ladder[:3]) is None
    assert enough(ladder[1:2]) == 1


def test_a_random_choice_is_seldom_better_or_worse_than_chance():
    rng = np.random.default_rng(0)
    found = [
        against_random(outcome(rng.random()), outcome(*rng.random(N_DRAWS))) for _ in range(2000)
    ]
    assert found.count("better") / 2000 == pytest.approx(1 / 21, abs=0.015)
    assert found.count("worse") / 2000 == pytest.approx(1 / 21, abs=0.015)


# Words and JSON


def test_the_line_of_an_insight_has_the_numbers_of_the_json():
    found = measure_effects(subject(n=40), ALL, 6, seed=0)
    strategies = effects_json(found)["strategies"]
    cases = {"recency": ("recent", 10), "uniform": ("even", 10), "sparse": ("top-k", 5)}
    for pattern, (name, n_keep) in cases.items():
        own, random, worst = (
            next(s for s in strategies[one]["sizes"] if s["n_keep"] == n_keep)
            for one in (name, "random", "least-attended")
        )
        text = effect_line(found, pattern)
        assert f"{n_keep}" in text.split(" of 40 transitions")[0]
        assert f"action in {own['flips']:.0%} of 6 decisions (KL {own['kl_mean']:.2f}" in text
        low, high = random["flips_band"]
        assert f"{random['flips']:.0%} ({low:.0%} to {high:.0%} over 20 draws" in text
        assert f"the {n_keep} least attended: {worst['flips']:.0%}" in text
        verdict = {"better": "Better than each", "worse": "Worse than each", "alike": "than random"}
        assert verdict[own["against_random"]] in text
    assert "the 12 most attended of 40" in effect_line(found, "focused")


def test_the_line_names_all_else_that_is_advised():
    found = measure_effects(subject(n=40), ALL, 6, seed=0)
    for pattern in ALL:
        text = effect_line(found, pattern)
        shown = "top-30" if pattern == "focused" else ("recent", "even", None, "top-k")[
            ALL.index(pattern)
        ]  # fmt: skip
        for name in {n for group in ADVISED[pattern] for n in group} - {shown, "random"}:
            assert f"{name} " in text or f"{name}," in text


def test_the_json_holds_all_that_the_picture_shows():
    found = measure_effects(subject(), ALL, 6, seed=0)
    content = json.loads(json.dumps(effects_json(found), allow_nan=False))
    assert content["settings"]["samples"] == list(range(6))
    for name, outcomes in found.curves.items():
        for size, one in zip(content["strategies"][name]["sizes"], outcomes, strict=True):
            assert (size["n_keep"], size["flips"]) == (one.n_keep, one.flip_share)
            assert (size["kl_mean"], size["kl_p95"]) == (one.kl_mean, one.kl_p95)
            assert ("kl_band" in size) == (name in module.DRAWN)
    for name, (own, random) in found.own_size.items():
        (size,) = content["strategies"][name]["sizes"]
        assert size["kept_mean"] == own.kept_mean
        assert size["random"]["kl_band"] == list(random.band("kl"))
    drawn = picture(content)
    assert drawn["strategies"] == content["strategies"]
    assert drawn["empty"] == content["controls"]["empty"]


def test_the_table_fits_the_console_and_starts_with_the_least_harmful():
    found = measure_effects(subject(n=40), ALL, 6, seed=0)
    lines = effects_block(found).splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(found.curves)]}
    assert set(rows) == set(found.curves)
    harm = [np.mean([one.kl_mean for one in found.curves[name]]) for name in rows]
    assert harm == sorted(harm)
    assert [cell.rstrip("+-") for cell in rows["recent"].split() if "%" in cell] == [
        f"{one.flip_share:.0%}" for one in found.curves["recent"]
    ]
