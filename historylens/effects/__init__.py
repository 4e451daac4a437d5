"""What dropping history does to the action, and how far attention foretells it.

    effects = measure_effects(agent, [0, 1], [[0, 1], [0, 1]], insights, n_samples=10, seed=0)
    print(effects.text); content["effects"] = effects.json
    deletion_curves("deletion_curves.png", **effects.picture)         # where it is not None

A model that cannot be run on shortened histories is told so, and the rest of an analysis stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from historylens.agent import Agent
from historylens.common.batches import is_out_of_memory
from historylens.common.errors import UserError
from historylens.common.text import wrap
from historylens.effects.faithfulness import Faithfulness, measure_faithfulness
from historylens.effects.measure import WORST, Effects, Trial, choose_samples, compress_decisions
from historylens.effects.report import effects_block, faithfulness_block, with_effects
from historylens.insights import Insight


@dataclass(frozen=True)
class MeasuredEffects:
    """What was measured on some decisions.

    Attributes:
        effects: what methods do to the action; None where it was not measured.
        faithfulness: how attention ranks transitions beside what they do; None likewise.
        reason: why nothing was measured; None where it was, or was not asked for.
    """

    effects: Effects | None = None
    faithfulness: Faithfulness | None = None
    reason: str | None = None

    @property
    def json(self) -> dict[str, Any] | None:
        """Its part of `metrics.json`; None where it was not asked for."""
        if self.effects is None:
            return None if self.reason is None else {"not_measured": self.reason}
        guide = None if self.faithfulness is None else self.faithfulness.json()
        return self.effects.json() | {"faithfulness": guide}

    @property
    def text(self) -> str:
        """Its tables on the console, empty where it was not asked for."""
        if self.effects is None:
            return "" if self.reason is None else wrap(f"EFFECT OF DROPPING HISTORY: {self.reason}")
        blocks = [effects_block(self.effects)]
        if self.faithfulness is not None:
            blocks.append(faithfulness_block(self.faithfulness))
        return "\n\n".join(blocks)

    @property
    def picture(self) -> dict[str, Any] | None:
        """Arguments of `curveplot.deletion_curves`; None where there is nothing to draw."""
        if self.effects is None or not self.effects.curves.get("random"):
            return None
        values = self.effects.json()
        return {
            "strategies": values["strategies"],
            "empty": values["controls"].get("empty"),
            "n_context": self.effects.n,
            "worst": WORST,
        }

    def attached(self, insights: Sequence[Insight]) -> list[Insight]:
        """Insights with what their advice did."""
        return list(insights) if self.effects is None else with_effects(insights, self.effects)


def measure_effects(
    agent: Agent,
    layers: Sequence[int],
    heads: Sequence[Sequence[int]],
    insights: Sequence[Insight],
    n_samples: int,
    seed: int,
    bar: tqdm | None = None,
) -> MeasuredEffects:
    """Measure what the advice of insights does, and how far attention is a guide at all.

    Args:
        agent: what decides.
        layers: numbers of the layers whose attention is judged as a guide.
        heads: numbers of their heads, for each of these layers.
        insights: what was found in the attention.
        n_samples: decisions to measure on; 0: nothing is measured.
        seed: of everything drawn.
        bar: shows the progress.
    """
    if not n_samples:
        return MeasuredEffects()
    patterns = {insight.pattern for insight in insights}
    bar = tqdm(disable=True) if bar is None else bar
    try:
        trial = Trial(agent, choose_samples(agent, n_samples), seed)
        effects = compress_decisions(trial, patterns, bar)
        if effects.ignores_history:
            return MeasuredEffects(effects)
        return MeasuredEffects(effects, measure_faithfulness(trial, layers, heads, bar))
    except UserError as error:
        reason = f"not measured, the model cannot be run on less history. {error}"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = f"not measured, {agent.device} ran out of memory."
    return MeasuredEffects(reason=reason)
