"""Measured effects as console text: a line under each insight, and two tables.

insights = with_effects(insights, effects)
print(effects_block(effects)); print(faithfulness_block(found))
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attention.console import aligned, wrap
from attention.evidence import counted
from attention.insights import Insight
from effects.faithfulness import Faithfulness, mean_defined
from effects.measure import N_DRAWS, UNMOVED_EMPTY, WORST, Effects, budgets, share_of
from effects.outcomes import UNMOVED, Outcome, against_random, enough

# For each pattern: the strategy of its line, and at how many transitions.
HEADLINES = {"recency": ("recent", 10), "uniform": ("even", 10), "sparse": ("top-k", 5)}
PHRASES = {
    "recent": "the latest {}",
    "even": "{} evenly spaced ones",
    "top-k": "the {} most attended",
    "top-30": "the {} most attended",
}
NOTHING = 1e-3  # nats: below, an action is as it was
CONTROL_WORDS = {
    "empty": "no history at all",
    "other-task": "another task's history",
    "shuffled-rewards": "shuffled rewards",
}
MARKS = {"better": "+", "alike": " ", "worse": "-"}


def with_effects(insights: Sequence[Insight], effects: Effects) -> list[Insight]:
    """Insights with what their advice did: on the last one of each pattern, for all of it."""
    last = {insight.pattern: i for i, insight in enumerate(insights)}
    return [
        replace(insight, effect=effect_line(effects, insight.pattern))
        if last[insight.pattern] == i
        else insight
        for i, insight in enumerate(insights)
    ]


def effect_line(effects: Effects, pattern: str) -> str:
    """What the advice of a pattern does to the action, beside random and worst choices."""
    if effects.ignores_history:
        return f"{_ignores(effects)} (numbers below)."
    name, n_keep = headline(effects.n, pattern)
    found = effects.at(name, n_keep)
    if found is None:
        return nothing_to_choose(effects, name)
    outcome, random = found
    n_kept = _number(outcome.kept_mean)
    parts = [
        f"Keeping {PHRASES[name].format(n_kept)} of {effects.n} transitions changes the most "
        f"likely action in {outcome.flip_share:.0%} of {counted(len(effects.samples), 'decision')} "
        f"(KL {nats(outcome.kl_mean)} nats, 95th percentile {nats(outcome.kl_p95)}); "
        f"{n_kept} random ones: {_random_words(random)}"
    ]
    worst = effects.at(WORST, round(outcome.kept_mean))
    if worst is not None:
        parts[0] += f"; the {n_kept} least attended: {_short(worst[0])}"
    parts[0] += "."
    parts.append(verdict(outcome, random))
    others = _others(effects, pattern, name, n_keep)
    if others:
        parts.append(f"Also advised, at {n_kept}: {others}.")
    return " ".join(parts)


def headline(n: int, pattern: str) -> tuple[str, int]:
    """The strategy that a pattern's line is about, and its size: one that was measured."""
    if pattern not in HEADLINES:
        return "top-30", share_of(n)
    name, wanted = HEADLINES[pattern]
    return name, max((size for size in budgets(n) if size <= wanted), default=0)


def verdict(outcome: Outcome, random: Outcome) -> str:
    """Whether a strategy is better than chance at its size, in a sentence."""
    n_draws = len(random.kl)
    found = against_random(outcome, random)
    if found == "better":
        return f"Better than each of {n_draws} random draws."
    if found == "worse":
        return f"Worse than each of {n_draws} random draws: here the pattern misleads."
    if max(outcome.kl_mean, random.kl.mean(axis=1).max()) <= NOTHING:
        return "A random choice changes nothing either: at this size nothing is lost."
    n_less = int((random.kl.mean(axis=1) <= outcome.kl_mean).sum())
    less = f"{n_less} of {n_draws} random draws moved the action distribution no more"
    if n_less < n_draws / 2:
        return f"Not clearly better than random: {less}."
    return f"No better than random: {less}. The pattern is no guide to what can go here."


def ignored(effects: Effects) -> str:
    """How it shows that the model ignores its history."""
    found = [
        f"{CONTROL_WORDS[name]} KL {nats(outcome.kl_mean)} nats and {outcome.flip_share:.0%} flips"
        for name, outcome in effects.controls.items()
    ]
    return (
        f"{_ignores(effects)}: {'; '.join(found)} (the actions count as unmoved up to KL "
        f"{UNMOVED} nats, and {UNMOVED_EMPTY} with no history)."
    )


def _ignores(effects: Effects) -> str:
    decisions = counted(len(effects.samples), "decision")
    return f"No compression can be judged: over {decisions} the model ignores its history"


def nothing_to_choose(effects: Effects, name: str) -> str:
    """Why there is no outcome of a strategy."""
    if name in effects.not_run:
        return f"Not measured: {effects.not_run[name]}."
    text = f"With {counted(effects.n, 'transition')} there is nothing to choose from"
    if "empty" in effects.controls:
        empty = _short(effects.controls["empty"])
        text += f"; dropping all history changes the most likely action in {empty}"
    return f"{text}."


def _random_words(random: Outcome) -> str:
    low, high = random.band("flips")
    return (
        f"{random.flip_share:.0%} ({low:.0%} to {high:.0%} over {len(random.kl)} draws, "
        f"KL {nats(random.kl_mean)})"
    )


def _others(effects: Effects, pattern: str, name: str, n_keep: int) -> str:
    """Outcomes of what else a pattern advises, least harmful first."""
    found = []
    for other in effects.advised[pattern]:
        pair = effects.at(other, n_keep)
        if other == name or pair is None:
            continue
        kept = "" if pair[0].n_keep == n_keep else f", keeping {_number(pair[0].kept_mean)},"
        chance = {
            "better": "",
            "alike": ", not clearly better than random",
            "worse": ", worse than random",
        }
        more = chance[against_random(*pair)]
        text = f"{other}{kept} {pair[0].flip_share:.0%} (KL {nats(pair[0].kl_mean)}{more})"
        found.append((pair[0].kl_mean, text))
    return "; ".join(text for _, text in sorted(found))


def effects_block(effects: Effects) -> str:
    """Table of flips by transitions kept, a line a strategy, least harmful first."""
    n_samples = counted(len(effects.samples), "decision")
    title = f"EFFECT OF DROPPING HISTORY ({n_samples}, {counted(effects.n, 'transition')} each)"
    if effects.ignores_history:
        return "\n".join([title, wrap(ignored(effects)), *_not_run_lines(effects)])
    lines = [title]
    sizes = budgets(effects.n)
    if sizes:
        names = sorted(effects.curves, key=lambda name: mean_kl(effects.curves[name]))
        table = [("kept", *map(str, sizes), "enough")]
        table += [(name, *_cells(effects, name), _enough_words(effects, name)) for name in names]
        width = max(map(len, names))
        lines += aligned([(first.ljust(width), *rest) for first, *rest in table])
        legend = (
            "decisions whose most likely action changes; + (-): the action distribution moves "
            f"less (more), in KL, than with each of {N_DRAWS} random draws; enough: fewest "
            f"transitions from which on the KL stays within {UNMOVED} nats"
        )
        lines.append(wrap(legend))
    for name, (own, random) in effects.own_size.items():
        text = (
            f"{name} keeps {_number(own.kept_mean)} ({own.kept.min()} to {own.kept.max()}): "
            f"{_short(own)}; as many random ones {_short(random)}"
        )
        lines.append(wrap(text, "", "  "))
    return "\n".join([*lines, *_controls_line(effects), *_not_run_lines(effects)])


def _cells(effects: Effects, name: str) -> list[str]:
    return [
        f"{one.flip_share:.0%}" + (MARKS[against_random(one, random)] if name != "random" else " ")
        for one, random in zip(effects.curves[name], effects.curves["random"], strict=True)
    ]


def mean_kl(outcomes: Sequence[Outcome]) -> float:
    """Mean KL over all sizes."""
    return float(np.mean([outcome.kl_mean for outcome in outcomes]))


def _enough_words(effects: Effects, name: str) -> str:
    found = enough(effects.curves[name])
    return f"> {budgets(effects.n)[-1]}" if found is None else str(found)


def _controls_line(effects: Effects) -> list[str]:
    found = [f"{CONTROL_WORDS[name]} {_short(one)}" for name, one in effects.controls.items()]
    return [wrap(f"For comparison: {'; '.join(found)}.")] if found else []


def _not_run_lines(effects: Effects) -> list[str]:
    return [
        wrap(f"{CONTROL_WORDS.get(name, name)}: could not be run, {reason}.", "", "  ")
        for name, reason in effects.not_run.items()
    ]


def faithfulness_block(found: Faithfulness | None) -> str:
    """How far attention ranks transitions by their effect: a line a layer, and what it means."""
    title = "HOW FAR ATTENTION IS A GUIDE"
    if found is None:
        return (
            f"{title}\nNot measured: the histories are empty, or longer than what the model reads."
        )
    table = [("layer", "head average", "best head", "worst head")]
    means = mean_defined(found.layer_means.T)
    for layer, numbers, heads, mean in zip(
        found.layers, found.head_numbers, found.heads, means, strict=True
    ):
        by_head = mean_defined(heads)
        ends = ["-", "-"]
        if np.isfinite(by_head).any():
            places = int(np.nanargmax(by_head)), int(np.nanargmin(by_head))
            ends = [f"{_signed(by_head[place])} (head {numbers[place]})" for place in places]
        table.append((str(layer), _signed(mean), *ends))
    legend = (
        "Spearman correlation of the query's attention with the KL that leaving out each of "
        f"{counted(found.kl.shape[1], 'transition')} alone causes, mean over "
        f"{counted(len(found.samples), 'decision')}; 1: attention ranks transitions as their "
        "effect does, 0: it says nothing"
    )
    return "\n".join([title, wrap(_guide_words(found)), *aligned(table), wrap(legend)])


def _guide_words(found: Faithfulness) -> str:
    best, overall = found.best_head, found.overall
    if best is None:
        return "Not defined: attention, or the effect of every transition, is the same throughout."
    layer, head, value = best
    recency = float(mean_defined(found.recency))
    return (
        f"Attention of layer {layer} head {head} ranks transitions most like their measured "
        f"effect: {_signed(value)}. The average over all layers and heads reaches "
        f"{_signed(overall)}, and ranking the latest first, without a look at attention, "
        f"{_signed(recency)}."
    )


def nats(value: float) -> str:
    """A divergence with the digits that matter."""
    if value < NOTHING:
        return "0" if value == 0 else f"< {NOTHING}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _short(outcome: Outcome) -> str:
    return f"{outcome.flip_share:.0%} (KL {nats(outcome.kl_mean)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value + 0.0:.2f}" if np.isfinite(value) else "-"
