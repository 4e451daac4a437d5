"""Everything that was measured on some decisions: as plain values, and as console text.

print(effects.text); write_json(path, {"effects": effects.json})
insights = effects.attached(insights)                              # a line for each pattern
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from historylens.common.text import aligned, counted, wrap
from historylens.compression import METHODS
from historylens.effects.effect import (
    BAND,
    UNMOVED,
    UNMOVED_EMPTY,
    Effect,
    budgets,
    enough,
    has_own_size,
    share_of,
)
from historylens.effects.faithfulness import Faithfulness
from historylens.effects.measure import DRAWN, N_DRAWS
from historylens.insights import Insight
from historylens.insights.patterns import PATTERNS

WORST = "least-attended"
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


@dataclass(frozen=True)
class MeasuredEffects:
    """What compressing history did to some decisions; by default nothing was measured.

    Attributes:
        reason: why nothing was measured; None where it was, or was not asked for.
        samples: numbers of the decisions, `B` of them.
        n: transitions before each; decisions with another number were left out.
        seed: of everything drawn.
        patterns: whose advice was measured.
        controls: name -> what it did: of "empty" and the controls those that could be run.
        not_run: control or method -> why it could not be run.
        ignores_history: the history can be exchanged and the actions stay: nothing else is
            measured then.
        curves: method -> effects at `budgets(n)`, "random" always among them; of one that keeps as
            many as it needs, the one effect of that.
        faithfulness: how attention ranks transitions beside what they do.
    """

    reason: str | None = None
    samples: Sequence[int] = ()
    n: int = 0
    seed: int = 0
    patterns: Sequence[str] = ()
    controls: Mapping[str, Effect] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    ignores_history: bool = False
    curves: Mapping[str, Sequence[Effect]] = field(default_factory=dict)
    faithfulness: Faithfulness | None = None

    @property
    def json(self) -> dict[str, Any] | None:
        """Its part of `metrics.json`; None where it was not asked for."""
        if not self.samples:
            return None if self.reason is None else {"not_measured": self.reason}
        return {
            "settings": {
                "samples": list(self.samples),
                "n_context": self.n,
                "budgets": budgets(self.n),
                "n_random_draws": N_DRAWS,
                "band_percentiles": list(BAND),
                "seed": self.seed,
                "unmoved_nats": UNMOVED,
                "unmoved_empty_nats": UNMOVED_EMPTY,
            },
            "definitions": {
                "flips": "share of decisions whose most likely action changes",
                "kl": "KL(full || compressed) of the action distributions, nats",
                "band": "percentiles of the draws, each a mean over decisions",
                "against_random": "mean KL below (better) or above (worse) that of every draw",
                "enough": "fewest transitions from which on the mean KL stays within unmoved_nats",
            },
            "ignores_history": self.ignores_history,
            "controls": {name: one.json() for name, one in self.controls.items()},
            "not_run": self.not_run,
            "strategies": {name: self._strategy(name) for name in self.curves},
            "faithfulness": None if self.faithfulness is None else self.faithfulness.json(),
        }

    def _strategy(self, name: str) -> dict[str, Any]:
        curve = self.curves[name]
        values = {
            "rule": METHODS[name].rule,
            "looks_at": METHODS[name].looks_at,
            "advised_by": [p for p in self.patterns if name in PATTERNS[p].measured],
            "n_draws": DRAWN.get(name, 1),
            "sizes": [one.json() for one in curve],
        }
        if not has_own_size(name):
            return values | {"enough": enough(curve)}
        values["sizes"][0]["random"] = curve[0].random.json()
        return values

    @property
    def picture(self) -> dict[str, Any] | None:
        """Arguments of `curveplot.deletion_curves`; None where there is nothing to draw."""
        if not self.curves.get("random"):
            return None
        return {
            "strategies": {name: self._strategy(name) for name in self.curves},
            "empty": self.controls["empty"].json() if "empty" in self.controls else None,
            "n_context": self.n,
            "worst": WORST,
        }

    def at(self, name: str, n_keep: int) -> Effect | None:
        """A method's effect at a size; None where it was not measured."""
        curve = self.curves.get(name, ())
        return next((one for one in curve if has_own_size(name) or one.n_keep == n_keep), None)

    def attached(self, insights: Sequence[Insight]) -> list[Insight]:
        """Insights with what their advice did: on the last one of each pattern, for all of it."""
        last = {insight.pattern: insight for insight in insights if self.samples}
        return [
            replace(insight, effect=effect_line(self, insight.pattern))
            if last.get(insight.pattern) is insight
            else insight
            for insight in insights
        ]

    @property
    def text(self) -> str:
        """Its tables on the console, empty where it was not asked for."""
        title = "EFFECT OF DROPPING HISTORY"
        if not self.samples:
            return "" if self.reason is None else wrap(f"{title}: {self.reason}")
        n_samples = counted(len(self.samples), "decision")
        lines = [f"{title} ({n_samples}, {counted(self.n, 'transition')} each)"]
        controls = {CONTROL_WORDS[name]: one for name, one in self.controls.items()}
        if self.ignores_history:
            proof = "; ".join(
                f"{words} KL {nats(one.kl_mean)} nats and {one.flips:.0%} flips"
                for words, one in controls.items()
            )
            limits = f"KL {UNMOVED} nats, and {UNMOVED_EMPTY} with no history"
            text = f"{_ignores(self)}: {proof} (the actions count as unmoved up to {limits})."
            lines.append(wrap(text))
        else:
            lines += _table(self.curves, budgets(self.n))
            if controls:
                text = "; ".join(f"{words} {_short(one)}" for words, one in controls.items())
                lines.append(wrap(f"For comparison: {text}."))
        lines += [
            wrap(f"{CONTROL_WORDS.get(name, name)}: could not be run, {reason}.", "", "  ")
            for name, reason in self.not_run.items()
        ]
        guide = [] if self.faithfulness is None else ["", self.faithfulness.text()]
        return "\n".join([*lines, *guide])


def _table(curves: Mapping[str, Sequence[Effect]], sizes: Sequence[int]) -> list[str]:
    """Flips by transitions kept, a line a method, least harmful first."""
    lines = []
    if sizes:
        table = [("kept", *map(str, sizes), "enough")]
        names = [name for name in curves if not has_own_size(name)]
        for name in sorted(names, key=lambda name: np.mean([one.kl_mean for one in curves[name]])):
            cells = [f"{one.flips:.0%}{MARKS[one.against_random]}" for one in curves[name]]
            fewest = enough(curves[name])
            table.append((name, *cells, f"> {sizes[-1]}" if fewest is None else str(fewest)))
        legend = (
            "decisions whose most likely action changes; + (-): the action distribution moves "
            f"less (more), in KL, than with each of {N_DRAWS} random draws; enough: fewest "
            f"transitions from which on the KL stays within {UNMOVED} nats"
        )
        lines += [*aligned(table, left=[0]), wrap(legend)]
    for name in filter(has_own_size, curves):
        own = curves[name][0]
        text = (
            f"{name} keeps {_number(own.kept_mean)} ({own.kept_min} to {own.kept_max}): "
            f"{_short(own)}; as many random ones {_short(own.random)}"
        )
        lines.append(wrap(text, "", "  "))
    return lines


def effect_line(effects: MeasuredEffects, pattern: str) -> str:
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


def _ignores(effects: MeasuredEffects) -> str:
    decisions = counted(len(effects.samples), "decision")
    return f"No compression can be judged: over {decisions} the model ignores its history"


def _nothing_to_choose(effects: MeasuredEffects, name: str) -> str:
    """Why a method has no effect to tell of."""
    if name in effects.not_run:
        return f"Not measured: {effects.not_run[name]}."
    text = f"With {counted(effects.n, 'transition')} there is nothing to choose from"
    if "empty" in effects.controls:
        empty = _short(effects.controls["empty"])
        text += f"; dropping all history changes the most likely action in {empty}"
    return f"{text}."


def _others(effects: MeasuredEffects, pattern: str, name: str, n_keep: int) -> str:
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


def nats(value: float) -> str:
    """A divergence with the digits that matter."""
    if value < NOTHING:
        return "0" if value == 0 else f"< {NOTHING}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _short(effect: Effect) -> str:
    return f"{effect.flips:.0%} (KL {nats(effect.kl_mean)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"
