"""What dropping history does to the action, and how far attention foretells it.

effects = measure_effects(agent, [0, 1], [[0, 1], [0, 1]], insights, n_samples=10, seed=0)
print(effects.text); content["effects"] = effects.json
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from historylens.agent import Agent
from historylens.common.batches import is_out_of_memory
from historylens.common.errors import UserError
from historylens.effects.faithfulness import affordable, measure_faithfulness
from historylens.effects.measure import Trial, budgets, has_own_size
from historylens.effects.report import WORST, MeasuredEffects
from historylens.effects.twins import moved_twins
from historylens.insights import Insight
from historylens.insights.patterns import PATTERNS

STANDARD = ("recent", "even", "top-k", "rewarded-recent", WORST)  # whatever patterns advise


@torch.inference_mode()
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

    On `n_samples` decisions (0: nothing is measured); of the `heads` (numbers, for each layer) of
    `layers`. Of a model that cannot be run on shortened histories the result says so.
    """
    if not n_samples:
        return MeasuredEffects()
    bar = tqdm(disable=True) if bar is None else bar
    advised = {insight.pattern for insight in insights}
    patterns = [pattern for pattern in PATTERNS if pattern in advised]
    names = list(dict.fromkeys([*STANDARD, *(n for p in patterns for n in PATTERNS[p].measured)]))
    try:
        trial = Trial(agent, n_samples, seed)
        n, samples = trial.n, trial.samples
        n_sizes = len(budgets(n)) + sum(map(has_own_size, names))
        bar.total = 1 + n_sizes + len(affordable(len(samples), n))
        controls = trial.controls()
        bar.update()
        about = (None, samples, n, seed, patterns, controls, trial.not_run, trial.beta)
        measured = MeasuredEffects(*about, n_actions=trial.full.shape[1])
        if controls and not measured.unmoved:
            measured = replace(measured, twins=_twins(trial, measured.main_control))
        if measured.ignores_history:
            return measured
        curves = trial.curves(names, bar)
        guide = measure_faithfulness(trial, layers, heads, bar)
        return replace(measured, curves=curves, faithfulness=guide)
    except UserError as error:
        return MeasuredEffects(f"not measured, the model cannot be run on less history. {error}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return MeasuredEffects(f"not measured, {agent.device} ran out of memory.")


def _twins(trial: Trial, control: str) -> list[float]:
    """What a control does with the model's weights shuffled; nothing where that does not work."""
    try:
        rows, other = trial.exchanged(control)
        return moved_twins(trial.agent, trial.history.rows(rows), other, trial.seed)
    except Exception as error:  # a model may fail as it likes with weights that are not its own
        trial.not_run["twins"] = next(iter(str(error).splitlines()), type(error).__name__)
        return []
