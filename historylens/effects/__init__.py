"""What dropping history does to the action, and how far attention foretells it.

    effects = measure_effects(agent, [0, 1], [[0, 1], [0, 1]], insights, n_samples=10, seed=0)
    print(effects.text); content["effects"] = effects.json
    deletion_curves("deletion_curves.png", **effects.picture)         # where it is not None

Attention suggests what can go; only the model, run on what is left, shows it.
"""

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from historylens.agent import Agent
from historylens.common.batches import is_out_of_memory
from historylens.common.errors import UserError
from historylens.effects.effect import budgets, has_own_size
from historylens.effects.faithfulness import affordable, measure_faithfulness
from historylens.effects.measure import (
    Trial,
    choose_samples,
    ignores_history,
    run_controls,
    run_methods,
)
from historylens.effects.report import WORST, MeasuredEffects
from historylens.insights import Insight
from historylens.insights.patterns import PATTERNS

STANDARD = ("recent", "even", "top-k", "rewarded-recent", WORST)  # whatever patterns advise


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

    A model that cannot be run on shortened histories is told so, and the rest of an analysis
    stands.

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
    bar = tqdm(disable=True) if bar is None else bar
    advised = {insight.pattern for insight in insights}
    patterns = [pattern for pattern in PATTERNS if pattern in advised]
    names = list(dict.fromkeys([*STANDARD, *(n for p in patterns for n in PATTERNS[p].measured)]))
    try:
        trial = Trial(agent, choose_samples(agent, n_samples), seed)
        n, n_samples = trial.n, len(trial.samples)
        n_steps = 1 + len(budgets(n)) + sum(map(has_own_size, names))
        bar.total = n_steps + len(affordable(n_samples, n))
        controls, not_run = run_controls(trial)
        bar.update()
        measured = MeasuredEffects(None, trial.samples, n, seed, patterns, controls, not_run)
        if ignores_history(controls):
            return replace(measured, ignores_history=True)
        curves = run_methods(trial, names, not_run, bar)
        guide = measure_faithfulness(trial, layers, heads, bar)
        return replace(measured, curves=curves, faithfulness=guide)
    except UserError as error:
        return MeasuredEffects(f"not measured, the model cannot be run on less history. {error}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return MeasuredEffects(f"not measured, {agent.device} ran out of memory.")
