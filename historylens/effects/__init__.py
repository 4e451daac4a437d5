"""What dropping history does to the action, which heads act, and how far attention is a guide.

effects = measure_effects(agent, [0, 1], [[0, 1], [0, 1]], insights, n_samples=10, seed=0)
print(effects.text); content["effects"] = effects.json
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from historylens.agent import Agent
from historylens.capture import CaptureError
from historylens.common.errors import UserError, is_out_of_memory
from historylens.effects.guide import PLACES, QUESTIONS, best_head, measure_guide
from historylens.effects.heads import measure_heads
from historylens.effects.knockout import SETS, measure_knockout
from historylens.effects.measure import Trial, budgets, has_own_size
from historylens.effects.report import WORST, MeasuredEffects
from historylens.effects.twins import moved_twins
from historylens.insights import Insight
from historylens.insights.patterns import PATTERNS

N_TWIN_DECISIONS = 16  # at most
# Whatever patterns advise.
STANDARD = ("recent", "even", "top-k", "norm", "contribution", "rewarded-recent", WORST)


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
    if not any(map(agent.length, range(len(agent.decisions)))):
        return MeasuredEffects("not measured, no decision has a history.")
    bar = tqdm(disable=True) if bar is None else bar
    advised = {insight.pattern for insight in insights}
    patterns = [pattern for pattern in PATTERNS if pattern in advised]
    names = list(dict.fromkeys([*STANDARD, *(n for p in patterns for n in PATTERNS[p].measured)]))
    try:
        trial = Trial(agent, n_samples, seed)
        n, samples = trial.n, trial.samples
        if trial.history.norm is None:
            names = [name for name in names if name not in ("norm", "contribution")]
        n_sizes = len(budgets(n)) + sum(map(has_own_size, names))
        bar.total = 1 + n_sizes + len(QUESTIONS) * len(PLACES) + len(layers) + len(SETS)
        controls = trial.controls()
        bar.update()
        about = (None, samples, n, seed, patterns, controls, trial.not_run, trial.beta)
        measured = MeasuredEffects(*about, n_actions=trial.full.shape[1])
        if controls and not measured.unmoved:
            measured = replace(measured, twins=_twins(trial, measured.main_control))
        if measured.ignores_history:
            return measured
        guide = measure_guide(trial, layers, heads, bar)
        names += [best_head(guide)] if best_head(guide) else []
        found = {"guide": guide, "curves": trial.curves(names, bar)}
        return replace(measured, **found, **_of_heads(trial, layers, heads, bar))
    except UserError as error:
        return MeasuredEffects(f"not measured, the model cannot be run on less history. {error}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return MeasuredEffects(f"not measured, {agent.device} ran out of memory.")


def _of_heads(
    trial: Trial, layers: Sequence[int], heads: Sequence[Sequence[int]], bar: tqdm
) -> dict[str, Any]:
    """What exchanging heads and hiding keys does, where heads can be told apart."""
    found: dict[str, Any] = {}
    for name, measure in (
        ("heads", lambda: measure_heads(trial, layers, heads, bar)),
        ("knockout", lambda: measure_knockout(trial, layers, bar)),
    ):
        try:
            found[name] = measure()
        except (CaptureError, UserError) as error:
            trial.not_run[name] = str(error)
    return found


def _twins(trial: Trial, control: str) -> list[float]:
    """What a control does with the model's weights shuffled; nothing where that does not work."""
    try:
        some = trial.decisions(N_TWIN_DECISIONS)
        rows, other = trial.exchanged(control, some)
        return moved_twins(trial.agent, trial.history.rows(some[rows]), other, trial.seed)
    except Exception as error:  # a model may fail as it likes with weights that are not its own
        trial.not_run["twins"] = next(iter(str(error).splitlines()), type(error).__name__)
        return []
