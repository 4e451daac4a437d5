"""Everything that was measured on some decisions: as plain values, and as console text.

print(effects.text); write_atomically(path, {"effects": effects.json})
insights = effects.attached(insights)                              # a line for each pattern
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from historylens.common.text import aligned, counted, wrap
from historylens.compression import METHODS
from historylens.effects import measure
from historylens.effects.guide import guide_text
from historylens.effects.inside import copied, heads_text, knockout_text
from historylens.effects.measure import UNMOVED, Effect, budgets, has_own_size, nats
from historylens.insights import Insight
from historylens.insights.patterns import PATTERNS

UNMOVED_EMPTY = 0.3  # as UNMOVED, without history: lack of tokens alone moves some
AS_CHANCE = 0.9  # of the flips of decisions drawn anew: as many are not nothing, whatever twins do
WORST = "least-attended"
PHRASES = {"recent": "the latest {}", "even": "{} evenly spaced {}"}
PHRASES |= dict.fromkeys(("top-k", "top-30"), "the {} most attended")
CONTROL_WORDS = {
    "empty": "no history at all",
    "other-task": "another task's history",
    "shuffled-rewards": "shuffled rewards",
    "twins": "the model with its weights shuffled",
}
MARKS = {"better": "+", "alike": " ", "worse": "-", None: " "}
N_SHOWN = 5  # methods on the console, beside random and the worst


@dataclass(frozen=True)
class MeasuredEffects:
    """What compressing history did to some decisions; by default nothing was measured."""

    reason: str | None = None  # why nothing was measured; None where it was, or was not asked for
    samples: Sequence[int] = ()  # numbers of the `B` decisions
    n: int = 0  # transitions before each; decisions with another number were left out
    seed: int = 0  # of everything drawn
    patterns: Sequence[str] = ()  # whose advice was measured
    controls: Mapping[str, Effect] = field(default_factory=dict)  # of those that could be run
    not_run: Mapping[str, str] = field(default_factory=dict)  # control, method -> why it was not
    beta: float = 1.0  # takes logits to the reference temperature
    n_actions: int = 2
    # Method -> effects at `budgets(n)`, "random" among them; of one that keeps as many as it needs,
    # the one effect of that. Empty where the history is ignored.
    curves: Mapping[str, Sequence[Effect]] = field(default_factory=dict)
    guide: Mapping[str, Any] | None = None  # as `measure_guide` gives it
    heads: Mapping[str, Any] | None = None  # as `measure_heads` gives it
    knockout: Mapping[str, Any] | None = None  # as `measure_knockout` gives it
    twins: Sequence[float] = ()  # `changed` by the main control in each; empty: none was run

    def _decisions(self) -> str:
        return counted(len(self.samples), "decision")

    @property
    def main_control(self) -> str:
        """Another task's history; where none is at hand, what comes closest."""
        return next(name for name in ("other-task", *CONTROL_WORDS) if name in self.controls)

    @property
    def unmoved_empty(self) -> float:
        """The share of actions that may change without history, for want of tokens."""
        return UNMOVED_EMPTY if "other-task" in self.controls else UNMOVED

    @property
    def unmoved(self) -> bool:
        """Whether the history can be exchanged or left out and hardly any action changes."""
        most = dict.fromkeys(self.controls, UNMOVED) | {"empty": self.unmoved_empty}
        each = [max(one.changed, one.flips) <= most[name] for name, one in self.controls.items()]
        return bool(each) and all(each)

    @property
    def ignores_history(self) -> bool:
        """Whether hardly any action changes, or no more than in a twin and less than by chance."""
        if not self.twins:
            return self.unmoved
        one, chance = self.controls[self.main_control], 1 - 1 / self.n_actions
        return one.changed <= max(self.twins) and one.flips < AS_CHANCE * chance

    @property
    def strategies(self) -> dict[str, dict[str, Any]]:
        """What each method is and did, as plain values."""
        strategies = {}
        for name, curve in self.curves.items():
            strategies[name] = about = {
                "rule": METHODS[name].rule,
                "looks_at": METHODS[name].looks_at,
                "advised_by": [p for p in self.patterns if name in PATTERNS[p].measured],
                "n_draws": measure.DRAWN.get(name, 1),
                "sizes": [one.json() for one in curve],
            }
            if has_own_size(name):
                about["sizes"][0]["random"] = curve[0].random.json()
            else:
                about["enough"] = measure.enough(curve)
        return strategies

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
                "n_random_draws": measure.N_DRAWS,
                "band_percentiles": list(measure.BAND),
                "seed": self.seed,
                "beta": self.beta,
                "enough_nats": measure.ENOUGH,
                "enough_flips": measure.ENOUGH_FLIPS,
                "unmoved": UNMOVED,
                "unmoved_empty": self.unmoved_empty,
            },
            "definitions": {
                "flips": "share of decisions whose most likely action changes",
                "kl": "KL(full || compressed) of the action distributions, nats",
                "band": "percentiles of the draws, each a mean over decisions",
                "beta": "factor of the logits at which their mean entropy is half of ln A: the "
                "reference temperature",
                "kl_reference": "KL with all logits times beta, nats",
                "changed": "share of actions drawn with logits times beta that change (total "
                "variation)",
                "twins": "changed by other-task, else by empty, in models with permuted weights",
                "against_random": "kl_reference below (better) or above (worse) that of every draw "
                "by more than 0.1 %",
                "enough": "fewest transitions from which on kl_reference stays within enough_nats "
                "and flips within enough_flips",
            },
            "ignores_history": self.ignores_history,
            "twins": list(self.twins),
            "controls": {name: one.json() for name, one in self.controls.items()},
            "not_run": self.not_run,
            "strategies": self.strategies,
            "guide": self.guide,
            "heads": self.heads,
            "knockout": self.knockout,
        }

    @property
    def curves_picture(self) -> dict[str, Any] | None:
        """Arguments of `effectplot.deletion_curves`; None where there is nothing to draw."""
        if not self.curves.get("random"):
            return None
        empty = self.controls["empty"].json() if "empty" in self.controls else None
        return {"strategies": self.strategies, "empty": empty, "n_context": self.n, "worst": WORST}

    @property
    def heads_picture(self) -> dict[str, Any] | None:
        """Arguments of `effectplot.head_effects`; None where there is nothing to draw."""
        if not self.heads:
            return None
        return {"heads": self.heads["heads"], "n_decisions": len(self.heads["samples"])}

    def attached(self, insights: Sequence[Insight]) -> list[Insight]:
        """Insights with what their advice did: on the last one of each pattern, for all of it."""
        last = {insight.pattern: place for place, insight in enumerate(insights) if self.samples}
        lines = {place: self.line(pattern) for pattern, place in last.items()}
        return [replace(one, effect=lines.get(place)) for place, one in enumerate(insights)]

    def line(self, pattern: str) -> str:
        """What the advice of a pattern does to the action, beside random and worst choices."""
        if self.ignores_history:
            return f"{self._ignored()} (numbers below)."
        name, most = PATTERNS[pattern].headline
        effect = self.at(name, max((size for size in budgets(self.n) if size <= most), default=0))
        if effect is None:
            return self._nothing(name)
        text = f"{self._beside_random(name, effect)}. {effect.verdict}"
        warning = copied(self.knockout) if pattern == "recency" else None
        return text if warning is None else f"{text} {warning}"

    def at(self, name: str, n_keep: int) -> Effect | None:
        """A method's effect at a size, or at its own; None where it was not measured."""
        curve = self.curves.get(name, ())
        return next((one for one in curve if has_own_size(name) or one.n_keep == n_keep), None)

    def _beside_random(self, name: str, effect: Effect) -> str:
        random, kept, worst = effect.random, effect.kept, self.at(WORST, round(effect.kept_mean))
        ones = "one" if kept == "1" else "ones"
        text = f"Keeping {PHRASES[name].format(kept, ones)} of {self.n} transitions changes the "
        text += f"most likely action in {effect.flips:.0%} of {self._decisions()} (KL "
        text += f"{nats(effect.kl_mean)} nats, 95th percentile {nats(effect.kl_p95)}); {kept} "
        text += f"random {ones}: {random}"
        return text if worst is None else f"{text}; the {kept} least attended: {worst}"

    def _nothing(self, name: str) -> str:
        """Why a method has no effect to tell of."""
        if name in self.not_run:
            return f"Not measured: {self.not_run[name]}."
        text = f"With {counted(self.n, 'transition')} there is nothing to choose from"
        if empty := self.controls.get("empty"):
            text += f"; dropping all history changes the most likely action in {empty}"
        return f"{text}."

    def _ignored(self) -> str:
        why = "the model ignores its history"
        if not self.unmoved:
            words = CONTROL_WORDS | {"empty": "the lack of any history"}
            why = f"{words[self.main_control]} moves the model no more than an untrained one"
        return f"No compression can be judged: over {self._decisions()} {why}"

    def _proof(self) -> str:
        """What the verdict that the history is ignored rests on."""
        words, changed = CONTROL_WORDS[self.main_control], self.controls[self.main_control].changed
        text = f"Of actions drawn at a reference temperature {words} changes {changed:.0%}"
        if self.unmoved:
            empty = self.unmoved_empty
            more = f", {empty:.0%} without history" if empty > UNMOVED else ""
            return f"{text}: {UNMOVED:.0%} count as nothing{more}."
        text += f", and {min(self.twins):.0%} to {max(self.twins):.0%} in {len(self.twins)} models "
        return text + "with these weights shuffled: untrained ones move as much."

    @property
    def text(self) -> str:
        """Its tables on the console, empty where it was not asked for."""
        title = "EFFECT OF DROPPING HISTORY"
        if not self.samples:
            return "" if self.reason is None else wrap(f"{title}: {self.reason}")
        lines = [f"{title} ({self._decisions()}, {counted(self.n, 'transition')} each)"]
        said = "; ".join(f"{CONTROL_WORDS[name]} {one}" for name, one in self.controls.items())
        if self.ignores_history:
            lines.append(wrap(f"{self._ignored()}: {said}. {self._proof()}"))
        else:
            lines += self._tables() if budgets(self.n) else []
            lines += [wrap(f"For comparison: {said}.")] if said else []
        for name, reason in self.not_run.items():
            text = f"{CONTROL_WORDS.get(name, name)}: could not be run, {reason}."
            lines.append(wrap(text, "", "  "))
        blocks = ["\n".join(lines)]
        blocks += [guide_text(self.guide)] if self.guide else []
        blocks += [heads_text(self.heads)] if self.heads else []
        blocks += [knockout_text(self.knockout, self.n)] if self.knockout else []
        return "\n\n".join(blocks)

    def _tables(self) -> list[str]:
        """Flips by transitions kept, a line a method, least harmful first; then own sizes."""
        sizes, own_sizes, harm = budgets(self.n), [], {}
        for name, curve in self.curves.items():
            if has_own_size(name):
                (own,) = curve
                kept = f"{own.kept} ({own.kept_min} to {own.kept_max})"
                text = f"{name} keeps {kept}: {own}; as many random ones {own.random}"
                own_sizes.append(wrap(text, "", "  "))
            else:
                harm[name] = np.mean([one.kl_reference for one in curve])
        ranked = sorted(harm, key=harm.get)
        others = [name for name in ranked if name not in ("random", WORST)]
        table = [("kept", *map(str, sizes), "enough")]
        for name in ranked:
            if name not in others[N_SHOWN:]:
                curve = self.curves[name]
                cells = [f"{one.flips:.0%}{MARKS[one.against_random]}" for one in curve]
                table.append((name, *cells, str(measure.enough(curve) or f"> {sizes[-1]}")))
        legend = f"decisions whose action changes; {len(others[:N_SHOWN])} of {len(others)} methods"
        legend += f"; + (-): KL below (above) {measure.N_DRAWS} random draws; enough: fewest from "
        legend += f"which on KL <= {measure.ENOUGH}, at a reference temperature, and changes <= "
        legend += f"{measure.ENOUGH_FLIPS:.0%}"
        return [*aligned(table, left=[0]), wrap(legend), *own_sizes]
