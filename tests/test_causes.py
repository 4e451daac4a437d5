"""Heads, knockout and the guide on models wired by hand; what is told of them and of effects."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import wired
from agents import ModelAgent
from compression_cases import decisions_of
from conftest import random_window, sharp_model
from plain_model import encoder_layer
from test_effects import BAR, DRAWN, Told, effects, moved

from historylens.common.errors import UserError
from historylens.common.text import WIDTH, columns
from historylens.effects import inside, measure
from historylens.effects.guide import best_head, guide_text, measure_guide, readings, rollout
from historylens.effects.measure import Resampled, Trial, enough, has_own_size, kl_divergence
from historylens.effects.roles import ROLES
from historylens.history import History
from historylens.insights.patterns import PATTERNS
from historylens.tokens import Tokens


def heads_of(agent):
    trial = Trial(agent, 99, 0, BAR)
    trial.controls()
    every = {layer: range(n) for layer, n in enumerate(agent.n_heads)}
    measured = inside.measure_heads(trial, every)
    json.dumps(measured, allow_nan=False)
    return measured, {(one["layer"], one["head"]): one for one in measured["heads"]}


def test_the_head_that_decides_is_told_from_one_that_is_read_without_effect():
    measured, heads = heads_of(wired.one_decides(n_decisions=4))
    assert heads[0, 0]["role"]["name"] == "rewarded"
    assert heads[0, 1]["role"]["name"] == "recency"
    for kind in ("mean", "other-task"):
        assert heads[0, 0][kind]["kl"] > 1
        assert heads[0, 1][kind]["kl"] == heads[0, 1][kind]["flips"] == 0
        assert heads[0, "all"][kind]["kl"] == pytest.approx(heads[0, 0][kind]["kl"])
    assert heads[0, 0]["other-task"]["flips"] == 1
    logits = 8 * torch.eye(3)[[0, 1, 2, 0]]  # and with its mean over the decisions
    kl = kl_divergence(logits, logits.mean(0, keepdim=True)).mean()
    assert heads[0, 0]["mean"]["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert "head-0-0" in inside.heads_text(measured).splitlines()[2]


def test_heads_that_back_each_other_up_show_together():
    _, heads = heads_of(wired.backed_up())
    for head in (0, 1):
        assert heads[0, head]["role"]["name"] == "rewarded"
        assert heads[0, head]["mean"]["flips"] == 0
    assert heads[0, "all"]["other-task"]["flips"] == 1
    assert heads[0, "all"]["mean"]["kl"] > 1


@pytest.mark.parametrize(
    ("agent", "verdict", "by_layer"),
    [(wired.one_decides, "read by the query itself", ["query", "all"]),
     (wired.copied, "read through other tokens", ["all"])],
)  # fmt: skip
def test_what_is_read_directly_is_told_from_what_was_copied_before(agent, verdict, by_layer):
    trial = Trial(agent(n_decisions=35), 99, 0, BAR)  # more than a knockout takes
    layers = range(len(trial.agent.layers))
    sets = inside.measure_knockout(trial, layers)["sets"]
    assert sets["rewarded"]["verdict"] == sets["older than 10"]["verdict"] == verdict
    for key in ("query", "all"):
        expected = key in by_layer
        assert (sets["rewarded"][key]["flips"] > 0.5) == expected
        first, *above = sets["rewarded"][key]["layers"].values()
        assert (first["flips"] > 0.5) == expected
        assert all(one["kl"] < 1e-6 for one in above)  # they read the copies alone
    assert sets["rewarded"]["n_mean"] == len(wired.REWARDED)
    assert "last episode" not in sets  # it is not known
    text = inside.knockout_text({"sets": sets}, trial.n)
    assert verdict in text
    assert " ".join(text.split()).endswith("; judged at the reference temperature")
    assert max(map(len, text.splitlines())) <= 100
    assert (inside.copied({"sets": sets}) is None) == (agent is wired.one_decides)
    assert inside.copied(None) is None


def test_what_is_hidden_is_hidden_from_all_tokens_or_from_those_of_no_transition():
    tokens = [Tokens.of(2, ("state", "action")), Tokens.of(2, ("state", "action"))]
    chosen = np.array([[True, False], [False, False]])
    every, query = (inside.hidden_from(tokens, chosen, x).int() for x in (True, False))
    assert every[1].sum() == query[1].sum() == 0
    assert every[0].tolist() == [[0] * 5] * 2 + [[1, 1, 0, 0, 0]] * 3
    assert query[0].tolist() == [[0] * 5] * 4 + [[1, 1, 0, 0, 0]]
    first = Tokens(np.array([-1, 0, 1]), ("query", "transition", "transition"), decides=2)
    (found,) = inside.hidden_from([first], chosen[:1], False).int().tolist()
    assert found == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_nothing_is_said_of_copies_where_some_layers_are_not_looked_at():
    trial = Trial(wired.copied(), 99, 0, BAR)
    trial.agent.sees_all = False
    with pytest.raises(UserError, match="some layers are not"):
        inside.measure_knockout(trial, [0])


@pytest.fixture(scope="module")
def trial(tiny_config):
    agent = ModelAgent(sharp_model(tiny_config))
    agent.can_place = True
    context, queries = random_window(tiny_config, n_samples=5, n=11)
    agent.decisions = decisions_of(History(*context, query_states=queries[:, -1]))
    return Trial(agent, 5, 0, BAR)


def test_the_guide_equals_sets_kept_and_dropped_one_by_one(trial):
    found = measure_guide(trial, {0: [0, 1], 1: [1]})
    json.dumps(found, allow_nan=False)
    assert found["keep"]["budgets"] == [1, 2]
    assert found["drop"]["budgets"] == [2]
    scores = readings(trial, {0: [0, 1], 1: [1]})
    names = ["attention", "norm", "contribution", "rollout", "recency"]
    names += ["layer 0", "layer 0 head 0", "layer 0 head 1", "layer 1", "layer 1 head 1"]
    assert [*scores] == names
    for question in ("keep", "drop"):
        for place in ("renumbered", "in place"):
            one = found[question][place]
            is_first = (question, place) == ("keep", "renumbered")
            assert [*one["readings"]] == (names if is_first else names[:5])
            for name, shown in one["readings"].items():
                for i, k in enumerate(found[question]["budgets"]):
                    of = [plain_kl(trial, b, scores[name][b], k, question, place) for b in range(5)]
                    own = [shown["kl"][i], shown["kl_reference"][i]]
                    assert own == pytest.approx(np.mean(of, axis=0), abs=1e-5)
            best, random = (np.array(one[name]["kl_reference"]) for name in ("best", "random"))
            sign = 1 if question == "keep" else -1
            assert (sign * best <= sign * random).all()
            kl = np.array([x["kl_reference"] for x in one["readings"].values()])
            assert (sign * best <= sign * kl + 1e-9).all()
            shares = [x["overall"]["share"] for x in one["readings"].values()]
            expected = (kl - random).sum(1) / (best - random).sum()
            np.testing.assert_allclose(shares, expected)
            assert max(shares) <= 1
    assert best_head(found) in ("head-0-0", "head-0-1", "head-1-1")
    assert max(map(len, guide_text(found).splitlines())) <= 100
    for question, place in product(("keep", "drop"), ("renumbered", "in place")):
        every = found[question][place]["readings"]
        for name, reading in every.items():
            share = -1.2 if name == "recency" else -0.99
            reading["overall"] |= {"share": share, "interval": [-310.0, 0.9]}
    first = found["keep"]["renumbered"]["readings"]
    first["layer 12 head 15"] = first["attention"]
    found["keep"]["renumbered"]["best_reading"] = "layer 12 head 15"
    told = guide_text(found)
    assert "<-99%  " in told
    assert "-99% [<-99%, 90%]" in told
    assert max(map(len, told.splitlines())) <= 100


def plain_kl(trial, b, scores, k, question, place):
    """Of one decision and one reading; among equals the latest."""
    best = sorted(range(trial.n), key=lambda j: (-float(scores[j]), -j))[:k]
    kept = sorted(best) if question == "keep" else [j for j in range(trial.n) if j not in best]
    history = trial.agent.history([trial.samples[b]])
    positions = torch.tensor([[*kept, trial.n]]) if place == "in place" else None
    logits = trial.agent.act(history.take(torch.tensor([kept])), positions)
    full = trial.full[b : b + 1]
    return [float(kl_divergence(full, logits, beta)) for beta in (1.0, trial.beta)]


def test_attention_is_a_guide_to_a_model_that_reads_rewards_and_recency_is_not():
    trial = Trial(wired.one_decides(n_decisions=12), 99, 0, BAR)
    found = measure_guide(trial, {0: [0, 1]})
    shares = {k: x["overall"]["share"] for k, x in found["keep"]["renumbered"]["readings"].items()}
    assert shares["layer 0 head 0"] == pytest.approx(1, abs=1e-6)
    assert shares["recency"] < 0.3
    assert best_head(found) == "head-0-0"
    told = " ".join(guide_text(found).split())
    assert "attention knows more than recency" in told
    assert "in place" not in told  # it cannot be told positions


def test_rollout_is_the_product_of_attention_and_the_residual_stream(trial):
    model, history = trial.agent.model, trial.history
    tensors = {name: t.double().numpy() for name, t in model.state_dict().items()}
    expected = []
    for x in model.embed(*history.inputs).detach().double().numpy():
        rows = np.eye(12)
        for number in range(2):
            x, weights = encoder_layer(tensors, number, x, n_heads=2)
            rows = (weights.mean(0) + np.eye(12)) / 2 @ rows
        expected.append(rows[-1, :-1])
    np.testing.assert_allclose(rollout(trial.agent, history), expected, atol=1e-5)


def test_where_no_transition_matters_there_is_no_guide():
    flat = wired.one_decides(decide=lambda stream: 0 * stream[:, wired.BROUGHT])
    found = measure_guide(Trial(flat, 99, 0, BAR), {0: [0]})
    assert found["keep"]["renumbered"]["best_reading"] is None
    assert "Not defined" in guide_text(found)
    assert best_head(found) is None


def test_intervals_hold_means_and_ratios_of_means():
    rng = np.random.default_rng(0)
    values, per = rng.normal(1, 1, (400, 3)), rng.uniform(1, 3, (400, 3))
    resampled = Resampled(400, np.random.default_rng(1))
    low, high = resampled.interval(values)
    assert ((low < values.mean(0)) & (values.mean(0) < high)).all()
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std(0) / 20, rtol=0.1)
    low, high = resampled.interval(values, per)
    ratio = values.mean(0) / per.mean(0)
    assert ((low < ratio) & (ratio < high) & (high - low < 0.2)).all()


def test_few_decisions_give_no_verdict_on_attention_and_one_neither_an_interval_nor_heads():
    for n in (6, 5, 1):
        trial = Trial(wired.one_decides(n_decisions=12), n, 0, BAR)
        found = measure_guide(trial, {0: [0, 1]})
        said = " ".join(guide_text(found).split())
        assert (f"So few decisions ({n}) say nothing of others." in said) == (n < 6)
        assert ("clearly" in said or "knows more" in said) == (n == 6)
    shown = found["keep"]["renumbered"]["readings"]["layer 0 head 0"]["overall"]
    assert (shown["share"], shown["interval"]) == (pytest.approx(1, abs=1e-6), None)
    with pytest.raises(UserError, match="two decisions or more, to have a mean of, got one"):
        inside.measure_heads(trial, {0: [0, 1]})


@pytest.mark.parametrize("kl", [0.0, 2e-4, 0.0456, 12.345])
def test_no_line_about_heads_is_wider_than_the_console(kl):
    moved = {"kl": kl, "kl_interval": [0.9 * kl, 1.1 * kl], "flips": 1.0}
    role = {"name": max(ROLES, key=len), "share": 1.0, "even": 1.0}
    one = {"layer": 10, "mean": moved, "other-task": moved, "role": role}
    heads = [one | {"head": head} for head in range(12)]
    told = inside.heads_text({"heads": heads, "samples": range(24), "not_told_apart": []})
    assert max(map(columns, told.splitlines())) <= WIDTH
    assert "head-10-0" in told


@pytest.fixture(scope="module")
def whole():
    return effects()


@pytest.mark.parametrize(("kl", "draws", "against_random", "words"), [
    (0.1, (0.2, 0.5, 0.4), "better", "Better than each of 3 random draws."),
    (0.2, (0.2, 0.5, 0.4), "alike", "Not clearly better than random: 1 of 3 random draws m"),
    (0.45, (0.2, 0.5, 0.4), "alike", "No better than random: 2 of 3 random draws moved the action "
     "distribution no more. The pattern is no guide to what can go here."),
    (0.6, (0.2, 0.5, 0.4), "worse", "Worse than each of 3 random draws: here the pattern"),
    (1e-4, (1e-4, 1e-3), "alike", "A random choice changes nothing either"),
    (0.2, (0.2 + 1e-7, 0.5, 0.4), "alike", "Not clearly better than random: 1 of 3 random draws m"),
    (0.5 + 1e-7, (0.2, 0.5, 0.4), "alike", "No better than random: 3 of 3 random draws moved"),
])  # fmt: skip
def test_better_than_random_is_better_than_every_draw(kl, draws, against_random, words):
    effect = moved(kl, random=moved(*draws))
    assert effect.against_random == against_random
    assert words in effect.verdict


def test_what_moves_a_model_no_more_than_an_untrained_one_is_named(whole):
    alone = {"empty": replace(whole.controls["empty"], flips=0.5)}
    found = replace(whole, controls=alone, twins=[1.0] * 19)
    said = "over 6 decisions the lack of any history moves the model no more than an untrained one"
    assert said in " ".join(found.text.split())


def test_enough_is_the_size_from_which_on_all_is_well_and_no_action_changes():
    ladder = [moved(x, n_keep=i) for i, x in enumerate((9, 0, 9, measure.ENOUGH, 0))]
    assert [enough(part) for part in (ladder, ladder[:3], ladder[1:2])] == [3, None, 1]
    close, closer = ladder[3:]
    flipping, raw = replace(closer, flips=2 * measure.ENOUGH_FLIPS), replace(close, kl_mean=9.0)
    assert [enough([close, flipping]), enough([flipping, closer])] == [None, 4]
    assert enough([raw, closer]) == 3  # how sharp the policy is says nothing


@pytest.mark.parametrize("pattern", ["recency", "uniform", "sparse"])
def test_the_line_of_an_insight_has_the_numbers_of_the_json(whole, pattern):
    name, n_keep = PATTERNS[pattern].headline
    own, random, worst = (
        next(s for s in whole.json["strategies"][one]["sizes"] if s["n_keep"] == n_keep)
        for one in (name, "random", "least-attended")
    )
    text = whole.line(pattern)
    assert f"{n_keep}" in text.split(" of 24 transitions")[0]
    assert f"action in {own['flips']:.0%} of 6 decisions (KL {own['kl_mean']:.2f}" in text
    assert f"{n_keep} random ones: {random['flips']:.0%} (KL {random['kl_mean']:.2f})" in text
    assert f"the {n_keep} least attended: {worst['flips']:.0%}" in text
    assert whole.at(name, n_keep).verdict in text


def test_the_line_stands_at_the_last_insight_of_a_pattern_and_warns_of_what_was_copied(whole):
    attached = whole.attached([Told("recency"), Told("sparse"), Told("recency")])
    assert [one.effect for one in attached] == [None, whole.line("sparse"), whole.line("recency")]
    assert "the 8 most attended of 24" in whole.line("focused")
    warning = "acts through newer tokens that have read it (KL 0.50 when no token can see it, 0.25"
    for verdict in ("read by the query itself", "not needed", "read through other tokens"):
        one = {"verdict": verdict, "all": {"kl": 0.5}, "query": {"kl": 0.25}}
        told = replace(whole, knockout={"sets": {"older than 10": one}})
        assert (warning in told.line("recency")) == (verdict == "read through other tokens")
        assert told.line("sparse") == whole.line("sparse")


def test_the_json_holds_all_that_the_picture_shows(whole):
    values = json.loads(json.dumps(whole.json, allow_nan=False))
    assert values["settings"]["samples"] == list(range(6))
    assert values["strategies"]["top-k"]["advised_by"] == ["focused", "sparse"]
    for name, curve in whole.curves.items():
        strategy = values["strategies"][name]
        for size, one in zip(strategy["sizes"], curve, strict=True):
            known = {key: x for key, x in vars(one).items() if key not in ("draws", "random")}
            known |= {"against_random": one.against_random}
            assert {key: size.get(key) for key in known} == known
            assert (one.kl_band is not None) == (name in DRAWN)
            assert size.get("random") == (one.random.json() if has_own_size(name) else None)
        assert ("enough" in strategy) != has_own_size(name)
    picture = {"strategies": values["strategies"], "empty": values["controls"]["empty"]}
    assert whole.curves_picture == picture | {"n_context": 24, "worst": "least-attended"}
    assert whole.heads_picture == {"heads": values["heads"]["heads"], "n_decisions": 6}


def test_the_table_fits_the_console_and_starts_with_the_least_harmful(whole):
    lines = whole.text.splitlines()
    assert max(map(len, lines)) <= 100
    curves = {n: curve for n, curve in whole.curves.items() if not has_own_size(n)}
    harm = {n: np.mean([one.kl_reference for one in curve]) for n, curve in curves.items()}
    least = sorted(harm, key=harm.get)  # of equal ones the first measured
    best = [name for name in least if name not in ("random", "least-attended")][:5]
    rows = {line.split()[0]: line for line in lines[2:9]}
    assert [*rows] == [name for name in least if name in (*best, "random", "least-attended")]
    for name, row in rows.items():
        cells = [cell.rstrip("+-") for cell in row.split() if "%" in cell]
        assert cells == [f"{one.flips:.0%}" for one in curves[name]]
    legend = f"decisions whose action changes; 5 of {len(curves) - 2} methods; "
    assert lines[9].startswith(legend)
    said = "on KL <= 0.09, at a reference temperature, and changes <= 25%"
    assert said in " ".join(whole.text.split())
    assert any(line.startswith("prune-low keeps ") for line in lines)
    titles = [part.split()[0] for part in whole.text.split("\n\n")]
    assert titles == ["EFFECT", "HOW", "WHICH", "READ"]
