"""What dropping history does, for one analysis: measured, said, and drawn.

    dropping = measure_dropping(analysis, insights, n_samples=10, seed=0)
    print(dropping.text); content["effects"] = dropping.content
    dropping.draw("figs/attention/deletion_curves.png")

A model that cannot be run on shortened histories is told so, and the rest of the analysis stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis import Analysis, is_out_of_memory
from attention.console import wrap
from attention.insights import Insight
from config import UserError
from effects.content import effects_json, faithfulness_json, picture
from effects.faithfulness import Faithfulness, affordable, measure_faithfulness
from effects.measure import Effects, alike_in_shape, measure_effects, n_steps
from effects.report import effects_block, faithfulness_block, with_effects


@dataclass(frozen=True)
class Dropping:
    """What was measured on some decisions.

    Attributes:
        effects: what strategies do to the action; None where it was not measured.
        faithfulness: how attention ranks transitions beside what they do; None likewise.
        reason: why nothing was measured; None where it was, or was not asked for.
    """

    effects: Effects | None = None
    faithfulness: Faithfulness | None = None
    reason: str | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether there is something to draw."""
        return self.effects is not None and bool(self.effects.curves.get("random"))

    @property
    def content(self) -> dict[str, Any] | None:
        """Its part of `metrics.json`."""
        if self.effects is None:
            return None if self.reason is None else {"not_measured": self.reason}
        return effects_json(self.effects) | {"faithfulness": faithfulness_json(self.faithfulness)}

    @property
    def text(self) -> str:
        """Its tables on the console, empty where it was not asked for."""
        if self.effects is None:
            return "" if self.reason is None else wrap(f"EFFECT OF DROPPING HISTORY: {self.reason}")
        blocks = [effects_block(self.effects)]
        if not self.effects.ignores_history:
            blocks.append(faithfulness_block(self.faithfulness))
        return "\n\n".join(blocks)

    def attached(self, insights: Sequence[Insight]) -> list[Insight]:
        """Insights with what their advice did."""
        return list(insights) if self.effects is None else with_effects(insights, self.effects)

    def draw(self, path: Path, dpi: int) -> None:
        """Draw the deletion curves, where there are any."""
        from attention.figures import deletion_curves  # slow to import

        if self.is_drawn:
            deletion_curves(path, **picture(self.content), dpi=dpi)


def measure_dropping(
    analysis: Analysis,
    insights: Sequence[Insight],
    n_samples: int,
    seed: int,
    bar: tqdm | None = None,
) -> Dropping:
    """Measure what the advice of insights does, and how far attention is a guide at all.

    Args:
        analysis: a subject, and which of its layers and heads are analysed.
        insights: what was found in its attention.
        n_samples: decisions to measure on; 0: nothing is measured.
        seed: of everything drawn.
        bar: shows the progress.
    """
    if not n_samples:
        return Dropping()
    patterns = {insight.pattern for insight in insights}
    bar = tqdm(disable=True) if bar is None else bar
    step = bar.update
    try:
        n = analysis.subject.history(alike_in_shape(analysis.subject)[:1]).n
        bar.total = n_steps(n, patterns) + len(affordable(range(n_samples), n))
        effects = measure_effects(analysis.subject, patterns, n_samples, seed, step)
        if effects.ignores_history:
            return Dropping(effects)
        chosen = affordable(effects.samples, effects.n)
        return Dropping(effects, measure_faithfulness(analysis, chosen, step))
    except UserError as error:
        return Dropping(reason=f"not measured, the model cannot be run on less history. {error}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Dropping(reason=f"not measured, {analysis.subject.device} ran out of memory.")
