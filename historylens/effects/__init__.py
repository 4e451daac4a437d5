"""What dropping history does to the action, which heads act, and how far attention is a guide.

effects = measure_effects(agent, [0, 1], [[0, 1], [0, 1]], insights, n_samples=10, seed=0, bar=bar)
print(effects.text); content["effects"] = effects.json
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from historylens.agent import Agent, act_in_parts
from historylens.capture import CaptureError
from historylens.common.errors import UserError, expect, is_out_of_memory
from historylens.effects.guide import PLACES, QUESTIONS, best_head, measure_guide
from historylens.effects.inside import SETS, measure_heads, measure_knockout
from historylens.effects.measure import Trial, action_changes, budgets, has_own_size, sharpness
from historylens.effects.report import WORST, MeasuredEffects
from historylens.insights import Insight
from historylens.insights.patterns import PATTERNS

STANDARD = ("recent", "even", "top-k", "norm", "contribution", "rewarded-recent", WORST)
N_TWIN_DECISIONS = 16  # at most
N_TWINS = 19  # an untrained model is moved more than all of them once in 20 times
MIN_TWINS = 4  # fewer say nothing
MAX_PERMUTED = 200_000_000  # weights, of all of them: none of models of more than 50 million


@torch.inference_mode()
def measure_effects(
    agent: Agent,
    layers: Sequence[int],
    heads: Sequence[Sequence[int]],
    insights: Sequence[Insight],
    n_samples: int,
    seed: int,
    bar: tqdm,
) -> MeasuredEffects:
    """Measure what the advice of insights does, and how far attention is a guide at all.

    On `n_samples` decisions (0: nothing is measured); of the `heads` (numbers, for each layer) of
    `layers`. Of a model that cannot be run on shortened histories the result says so.
    """
    if not n_samples:
        return MeasuredEffects()
    if not any(map(agent.length, range(len(agent.decisions)))):
        return MeasuredEffects("not measured, no decision has a history.")
    advised, chosen = {one.pattern for one in insights}, dict(zip(layers, heads, strict=True))
    patterns = [pattern for pattern in PATTERNS if pattern in advised]
    names = list(dict.fromkeys([*STANDARD, *(n for p in patterns for n in PATTERNS[p].measured)]))
    try:
        trial = Trial(agent, n_samples, seed, bar)
        if trial.history.norm is None:
            names = [name for name in names if name not in ("norm", "contribution")]
        n_sizes = len(budgets(trial.n)) + sum(map(has_own_size, names))
        bar.total = 1 + n_sizes + len(QUESTIONS) * len(PLACES) + len(layers) + len(SETS)
        controls = trial.controls()
        bar.update()
        about = trial.samples, trial.n, seed, patterns, controls, trial.not_run, trial.beta
        measured = MeasuredEffects(None, *about, n_actions=trial.full.shape[1])
        if controls and not measured.unmoved:
            measured = replace(measured, twins=moved_twins(trial, measured.main_control))
        if measured.ignores_history:
            return measured
        guide = measure_guide(trial, chosen)
        names += [best_head(guide)] if best_head(guide) else []
        found = {"guide": guide, "curves": trial.curves(names)}
        for name, measure in (("heads", measure_heads), ("knockout", measure_knockout)):
            try:
                found[name] = measure(trial, chosen)
            except (CaptureError, UserError) as error:  # heads that cannot be told apart
                trial.not_run[name] = str(error)
        return replace(measured, **found)
    except UserError as error:
        return MeasuredEffects(f"not measured, the model cannot be run on less history. {error}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return MeasuredEffects(f"not measured, {agent.device} ran out of memory.")


def moved_twins(trial: Trial, control: str) -> list[float]:
    """Share of actions that a control changes in each twin of the model, as `Effect.changed`.

    A model that uses its history is moved more than each of them, in which the entries of every
    weight matrix are permuted (Adebayo et al. 2018, arXiv 1810.03292). Its own weights are put back
    in any case, bit for bit. Empty, and noted in the trial, where that does not work.
    """
    agent, some = trial.agent, trial.decisions(N_TWIN_DECISIONS)
    matrices = [p for p in agent.model.parameters() if p.dim() > 1 and p.is_floating_point()]
    n_weights, own, moved = sum(p.numel() for p in matrices), [], []
    generator = torch.Generator().manual_seed(trial.seed)
    try:
        rows, other = trial.exchanged(control, some)
        expect(n_weights, "it has no weight matrices")
        n_twins = min(N_TWINS, MAX_PERMUTED // n_weights)  # two passes each, less than a curve
        expect(n_twins >= MIN_TWINS, f"it has too many weights ({n_weights:,})")
        history = trial.history.rows(some[rows])
        full = act_in_parts(agent, history)
        own += [p.clone() for p in matrices]
        for _ in range(n_twins):
            for matrix, values in zip(matrices, own, strict=True):
                order = torch.randperm(values.numel(), generator=generator).to(values.device)
                matrix.copy_(values.flatten()[order].reshape(values.shape))
            logits, others = act_in_parts(agent, history), act_in_parts(agent, other)
            expect(not torch.equal(logits, full), "act() is the same whatever its model's weights")
            moved.append(float(action_changes(logits, others, sharpness(logits)).mean()))
    except Exception as error:  # a model may fail as it likes with weights that are not its own
        trial.not_run["twins"] = next(iter(str(error).splitlines()), type(error).__name__)
        return []
    finally:
        for matrix, values in zip(matrices, own, strict=False):  # or none were exchanged
            matrix.copy_(values)
    return moved
