"""Measured effects as console text: a line under each insight, and two tables.

insights = with_effects(insights, effects)
print(effects_block(effects)); print(faithfulness_block(faithfulness))
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from historylens.common.text import aligned, counted, wrap
from historylens.effects.effect import UNMOVED, Effect, enough
from historylens.effects.faithfulness import Faithfulness, mean_defined
from historylens.effects.measure import (
    N_DRAWS,
    UNMOVED_EMPTY,
    WORST,
    Effects,
    budgets,
    has_own_size,
    share_of,
)
from historylens.insights import PATTERNS, Insight

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
MARKS = {"better": "+", "alike": " ", "worse": "-", None: " "}
CHANCE = {"better": "", "alike": ", not clearly better than random", "worse": ", worse than random"}


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
    effect = effects.at(name, n_keep)
    if effect is None:
        return _nothing_to_choose(effects, name)
    random, n_kept = effect.random, _number(effect.kept_mean)
    low, high = random.flips_band
    text = (
        f"Keeping {PHRASES[name].format(n_kept)} of {effects.n} transitions changes the most "
        f"likely action in {effect.flips:.0%} of {counted(len(effects.samples), 'decision')} "
        f"(KL {nats(effect.kl_mean)} nats, 95th percentile {nats(effect.kl_p95)}); {n_kept} random "
        f"ones: {random.flips:.0%} ({low:.0%} to {high:.0%} over {len(random.draws)} draws, "
        f"KL {nats(random.kl_mean)})"
    )
    worst = effects.at(WORST, round(effect.kept_mean))
    if worst is not None:
        text += f"; the {n_kept} least attended: {_short(worst)}"
    text += f". {verdict(effect)}"
    others = _others(effects, pattern, name, n_keep)
    return f"{text} Also advised, at {n_kept}: {others}." if others else text


def headline(n: int, pattern: str) -> tuple[str, int]:
    """The method that a pattern's line is about, and its size: one that was measured."""
    name, wanted = PATTERNS[pattern].headline
    if wanted is None:
        return name, share_of(n)
    return name, max((size for size in budgets(n) if size <= wanted), default=0)


def verdict(effect: Effect) -> str:
    """Whether a method is better than chance at its size, in a sentence."""
    draws = effect.random.draws
    n_draws = len(draws)
    if effect.against_random == "better":
        return f"Better than each of {n_draws} random draws."
    if effect.against_random == "worse":
        return f"Worse than each of {n_draws} random draws: here the pattern misleads."
    if max(effect.kl_mean, draws.max()) <= NOTHING:
        return "A random choice changes nothing either: at this size nothing is lost."
    n_less = int((draws <= effect.kl_mean).sum())
    less = f"{n_less} of {n_draws} random draws moved the action distribution no more"
    if n_less < n_draws / 2:
        return f"Not clearly better than random: {less}."
    return f"No better than random: {less}. The pattern is no guide to what can go here."


def _ignores(effects: Effects) -> str:
    decisions = counted(len(effects.samples), "decision")
    return f"No compression can be judged: over {decisions} the model ignores its history"


def _nothing_to_choose(effects: Effects, name: str) -> str:
    """Why a method has no effect to tell of."""
    if name in effects.not_run:
        return f"Not measured: {effects.not_run[name]}."
    text = f"With {counted(effects.n, 'transition')} there is nothing to choose from"
    if "empty" in effects.controls:
        empty = _short(effects.controls["empty"])
        text += f"; dropping all history changes the most likely action in {empty}"
    return f"{text}."


def _others(effects: Effects, pattern: str, name: str, n_keep: int) -> str:
    """What else a pattern advises does, least harmful first."""
    others = []
    for other in PATTERNS[pattern].measured:
        effect = effects.at(other, n_keep)
        if other == name or effect is None:
            continue
        kept = "" if effect.n_keep == n_keep else f", keeping {_number(effect.kept_mean)},"
        chance = CHANCE[effect.against_random]
        text = f"{other}{kept} {effect.flips:.0%} (KL {nats(effect.kl_mean)}{chance})"
        others.append((effect.kl_mean, text))
    return "; ".join(text for _, text in sorted(others))


def effects_block(effects: Effects) -> str:
    """Table of flips by transitions kept, a line a method, least harmful first."""
    n_samples = counted(len(effects.samples), "decision")
    lines = [f"EFFECT OF DROPPING HISTORY ({n_samples}, {counted(effects.n, 'transition')} each)"]
    controls = {CONTROL_WORDS[name]: one for name, one in effects.controls.items()}
    if effects.ignores_history:
        proof = "; ".join(
            f"{words} KL {nats(one.kl_mean)} nats and {one.flips:.0%} flips"
            for words, one in controls.items()
        )
        limits = f"KL {UNMOVED} nats, and {UNMOVED_EMPTY} with no history"
        text = f"{_ignores(effects)}: {proof} (the actions count as unmoved up to {limits})."
        lines.append(wrap(text))
    else:
        lines += _table(effects)
        if controls:
            text = "; ".join(f"{words} {_short(one)}" for words, one in controls.items())
            lines.append(wrap(f"For comparison: {text}."))
    lines += [
        wrap(f"{CONTROL_WORDS.get(name, name)}: could not be run, {reason}.", "", "  ")
        for name, reason in effects.not_run.items()
    ]
    return "\n".join(lines)


def _table(effects: Effects) -> list[str]:
    lines, sizes = [], budgets(effects.n)
    if sizes:
        table = [("kept", *map(str, sizes), "enough")]
        curves = {name: one for name, one in effects.curves.items() if not has_own_size(name)}
        for name in sorted(curves, key=lambda name: np.mean([one.kl_mean for one in curves[name]])):
            cells = [f"{one.flips:.0%}{MARKS[one.against_random]}" for one in curves[name]]
            fewest = enough(curves[name])
            table.append((name, *cells, f"> {sizes[-1]}" if fewest is None else str(fewest)))
        legend = (
            "decisions whose most likely action changes; + (-): the action distribution moves "
            f"less (more), in KL, than with each of {N_DRAWS} random draws; enough: fewest "
            f"transitions from which on the KL stays within {UNMOVED} nats"
        )
        lines += [*aligned(table, left=[0]), wrap(legend)]
    for name in filter(has_own_size, effects.curves):
        own = effects.curves[name][0]
        text = (
            f"{name} keeps {_number(own.kept_mean)} ({own.kept_min} to {own.kept_max}): "
            f"{_short(own)}; as many random ones {_short(own.random)}"
        )
        lines.append(wrap(text, "", "  "))
    return lines


def faithfulness_block(one: Faithfulness) -> str:
    """How far attention ranks transitions by their effect: a line a layer, and what it means."""
    table = [("layer", "head average", "best head", "worst head")]
    for layer, heads, values in zip(
        one.layers, one.heads, mean_defined(one.correlations), strict=True
    ):
        ends = ["-", "-"]
        if np.isfinite(values[:-1]).any():
            places = int(np.nanargmax(values[:-1])), int(np.nanargmin(values[:-1]))
            ends = [f"{_signed(values[place])} (head {heads[place]})" for place in places]
        table.append((str(layer), _signed(values[-1]), *ends))
    legend = (
        "Spearman correlation of the query's attention with the KL that leaving out each of "
        f"{counted(one.kl.shape[1], 'transition')} alone causes, mean over "
        f"{counted(len(one.samples), 'decision')}; 1: attention ranks transitions as their "
        "effect does, 0: it says nothing"
    )
    if one.best_head is None:
        text = "Not defined: attention, or the effect of every transition, is the same throughout."
    else:
        layer, head, value = one.best_head
        text = (
            f"Attention of layer {layer} head {head} ranks transitions most like their measured "
            f"effect: {_signed(value)}. The average over all layers and heads reaches "
            f"{_signed(mean_defined(one.means))}, and ranking the latest first, without a look at "
            f"attention, {_signed(mean_defined(one.recency))}."
        )
    return "\n".join(["HOW FAR ATTENTION IS A GUIDE", wrap(text), *aligned(table), wrap(legend)])


def nats(value: float) -> str:
    """A divergence with the digits that matter."""
    if value < NOTHING:
        return "0" if value == 0 else f"< {NOTHING}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _short(effect: Effect) -> str:
    return f"{effect.flips:.0%} (KL {nats(effect.kl_mean)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value + 0.0:.2f}" if np.isfinite(value) else "-"
