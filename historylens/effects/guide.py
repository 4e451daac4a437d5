"""How far attention is a guide to what matters: keep, or drop, what a reading of it ranks highest.

    guide = measure_guide(trial, heads={0: [0, 1, 2, 3], 1: [0]})
    print(guide_text(guide)); guide["keep"]["renumbered"]["readings"]["attention"]["overall"]

*Sufficiency*: how little the action distribution moves when only the `k` highest are kept.
*Comprehensiveness*: how far it moves when they are dropped (DeYoung et al. 2020, arXiv 1911.03429).
Both as a share of the way from random sets (0) to the best set found (1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from historylens.agent import Agent, act_in_parts, attend
from historylens.common.batches import MAX_WEIGHTS
from historylens.common.text import aligned, counted, wrap
from historylens.compression.method import ages, best_first, uniform
from historylens.effects.measure import NOTHING, Resampled, Trial, budgets, kl_divergence
from historylens.history import History
from historylens.tokens import sum_rows

N_SETS = {"keep": 15, "drop": 10}  # random sets a decision and budget
MAX_TOKENS_SETS = 75_000  # tokens run for one question: as many decisions as that allows
PLACES = {"renumbered": False, "in place": True}
LARGEST_SHARE = 5  # budgets go up to one transition in so many
FEW = 6  # decisions: fewer agree by chance more often than an interval of 95 % allows
QUESTIONS = {"keep": "keep highest", "drop": "drop them"}


def readings(trial: Trial, heads: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
    """Scores `(B, n)` float64 by name, of what a look at attention ranks transitions by."""
    history = trial.history
    found = {"attention": history.query_attention, "norm": history.norm}
    found |= {"contribution": history.contribution, "rollout": rollout(trial.agent, history)}
    found["recency"] = -ages(history)
    for layer, own in heads.items():
        by_head = history.head_attention[:, layer, list(own)]
        found[f"layer {layer}"] = by_head.mean(1)
        found |= {f"layer {layer} head {h}": by_head[:, i] for i, h in enumerate(own)}
    return {name: scores.double() for name, scores in found.items() if scores is not None}


def rollout(agent: Agent, history: History) -> Tensor | None:
    """Attention rollout of the query `(B, n)` (Abnar and Zuidema 2020, arXiv 2005.00928).

    None: whole maps are too large, or of other tokens than the model's.
    """
    tokens = agent.tokens(history)
    size, n_tokens = history.size, len(tokens[0])
    if n_tokens**2 * sum(agent.n_heads) * size > MAX_WEIGHTS:
        return None
    _, attention = attend(agent, history, maps=range(size), map_size=max(8, n_tokens))
    if any(layer.maps.shape[2] < n_tokens for layer in attention):
        return None
    rows = torch.zeros(size, n_tokens, dtype=torch.float64)
    rows[torch.arange(size), torch.tensor([one.decides for one in tokens])] = 1
    for layer in reversed(attention):
        weights = layer.maps.nan_to_num().double().mean(1)  # (B, T, T)
        rows = (rows + (rows[:, None] @ weights)[:, 0]) / 2
    return torch.from_numpy(sum_rows(rows[:, None].numpy(), tokens)[:, 0, :-1]).to(history.device)


def measure_guide(trial: Trial, heads: Mapping[int, Sequence[int]]) -> dict[str, Any] | None:
    """Both questions for each reading, as plain values; None: there is nothing to choose from.

    With positions renumbered, and where the model can be told positions also in place. Single
    layers and heads are only kept and renumbered; dropping reads long contexts, so that it is
    measured at every other budget, on fewer decisions.
    """
    scores, n = readings(trial, heads), trial.n
    sizes = [k for k in budgets(n) if k <= -(-n // LARGEST_SHARE)]
    if not sizes:
        return None
    result: dict[str, Any] = {"n_sets": N_SETS}
    result |= {"keep": {"budgets": sizes}, "drop": {"budgets": sizes[::-2][::-1]}}
    for question, n_sets in N_SETS.items():
        own = result[question]["budgets"]
        n_kept = [k if question == "keep" else n - k for k in own]
        for place, is_in_place in PLACES.items():
            if is_in_place and not trial.agent.can_place:
                continue
            is_first = question == "keep" and not is_in_place
            some = {name: x for name, x in scores.items() if is_first or "layer" not in name}
            per_decision = sum(k + 1 for k in n_kept) * (len(some) + n_sets)
            rows = trial.decisions(max(1, MAX_TOKENS_SETS // per_decision))
            kl = [_moved(trial, rows, [*some.values()], k, question, is_in_place) for k in own]
            result[question][place] = _shares(trial, np.stack(kl, 3), [*some], rows, question)
            trial.bar.update()
    return result


def _moved(
    trial: Trial, rows: Tensor, scores: Sequence[Tensor], k: int, question: str, in_place: bool
) -> np.ndarray:
    """KL, plain and at the reference temperature, `(2, R + n_sets, B)`: readings, random sets."""
    history, generator = trial.history.rows(rows), trial.generator(f"sets to {question}", k)
    drawn = uniform(generator, (N_SETS[question], *history.rewards.shape), history.device)
    ranked = torch.cat([torch.stack([x[rows] for x in scores]), drawn])  # (R + n_sets, B, n)
    order = best_first(ranked.flatten(0, 1))
    indices = (order[:, :k] if question == "keep" else order[:, k:]).sort(dim=1).values
    many = history.rows(torch.arange(len(rows), device=rows.device).repeat(len(ranked)))
    positions = pad(indices, (0, 1), value=trial.n) if in_place else None
    logits = act_in_parts(trial.agent, many.take(indices), positions)
    full = trial.full[rows].repeat(len(ranked), 1)
    kl = torch.stack([kl_divergence(full, logits, beta) for beta in (1.0, trial.beta)])
    return kl.view(2, -1, len(rows)).cpu().numpy()


def _shares(trial: Trial, both: np.ndarray, names: list[str], rows: Tensor, question: str) -> dict:
    """Readings between random sets and the best one, from KL `(2, R + n_sets, B, K)`."""
    best = both.min(axis=1) if question == "keep" else both.max(axis=1)  # (2, B, K)
    random = both[:, len(names) :].mean(axis=1)
    resampled = Resampled(len(rows), trial.generator("guide"))
    per, shown = (best - random)[1], {}

    def share(gained: np.ndarray, per: np.ndarray) -> dict[str, Any]:
        """A ratio of means over decisions, None where the best set does what random ones do."""
        if abs(per.mean()) <= NOTHING:
            return {"share": None, "interval": None}
        interval = resampled.interval(gained, per).tolist() if len(gained) > 1 else None
        return {"share": float(gained.mean() / per.mean()), "interval": interval}

    def means(values: np.ndarray) -> dict[str, list[float]]:  # (2, B, K)
        return dict(zip(("kl", "kl_reference"), values.mean(axis=1).tolist(), strict=True))

    gains = dict(zip(names, both[1, : len(names)] - random[1], strict=True))
    for i, (name, gained) in enumerate(gains.items()):
        by_budget = [share(x, y) for x, y in zip(gained.T, per.T, strict=True)]
        overall = share(gained.sum(1), per.sum(1))
        shown[name] = means(both[:, i]) | {"by_budget": by_budget, "overall": overall}
    overall = {name: one["overall"]["share"] for name, one in shown.items() if name != "recency"}
    leading, beside = None, {}
    if overall["attention"] is not None:  # then none is
        leading = max(overall, key=overall.get)
        for one, other in ((leading, "attention"), ("attention", "recency")):
            beside[f"{one} - {other}"] = share((gains[one] - gains[other]).sum(1), per.sum(1))
    return {
        "samples": [trial.samples[i] for i in rows.tolist()],
        "random": means(random),
        "best": means(best),
        "readings": shown,
        "best_reading": leading,
        "differences": beside,
    }


def best_head(guide: Mapping[str, Any] | None) -> str | None:
    """The method that keeps what the best single head ranks highest."""
    first = guide and guide["keep"]["renumbered"]
    if first is None or first["best_reading"] is None:
        return None
    shares = {k: x["overall"]["share"] for k, x in first["readings"].items() if " head " in k}
    return "head-{1}-{3}".format(*max(shares, key=shares.get).split())


def guide_text(guide: Mapping[str, Any]) -> str:
    """The best reading, attention and recency, a line each, and what that means."""
    shown = [(q, p) for q in QUESTIONS for p in PLACES if p in guide[q]]
    first = guide["keep"]["renumbered"]
    title, leading = "HOW FAR ATTENTION IS A GUIDE", first["best_reading"]
    if leading is None:
        why = "random transitions do as well as the best ones that were found"
        return f"{title}\nNot defined: {why}."
    header = [QUESTIONS[q] + (", in place" if p == "in place" else "") for q, p in shown]
    table = [["ranked by", *header]]
    for name in dict.fromkeys((leading, "attention", "recency")):
        own = [guide[q][p]["readings"].get(name) for q, p in shown]
        table.append([name, *(_cell(x and x["overall"]) for x in own)])
    n, n_drop = (len(guide[question]["renumbered"]["samples"]) for question in QUESTIONS)
    sizes = ", ".join(map(str, guide["keep"]["budgets"]))
    legend = "share of the way from random sets (0%) to the best one found (100%), in KL at the "
    legend += f"reference temperature, over k = {sizes} [95% interval over "
    legend += f"{counted(n, 'decision')}, {n_drop} for dropping]"
    legend += "; in place: not numbered anew" if ("keep", "in place") in shown else ""
    return "\n".join([title, wrap(_meaning(first, leading)), *aligned(table, [0]), wrap(legend)])


def _meaning(first: Mapping[str, Any], leading: str) -> str:
    """What to make of attention for this model."""
    over_attention, over_recency = first["differences"].values()
    share = {k: x["overall"]["share"] for k, x in first["readings"].items()}
    text = f"Keeping the most attended transitions goes {share['attention']:.0%} of the way from "
    text += "random ones to the best that were found"
    latest = f"the latest ones go {share['recency']:.0%}"
    if (n := len(first["samples"])) < FEW:
        return f"{text}; {latest}. So few decisions ({n}) say nothing of others."
    low, high = over_recency["interval"]
    if low > 0:
        text += f"; {latest}: attention knows more than recency."
    elif high < 0:
        text += f", but {latest}: recency is the better guide here, whatever attention says."
    else:
        text += f"; {latest}, which is not clearly different."
    if leading != "attention":
        clearly = "clearly" if over_attention["interval"][0] > 0 else "not clearly"
        text += f" Ranking by {leading} goes {share[leading]:.0%}, {clearly} more."
    return text


def _cell(overall: Mapping[str, Any] | None) -> str:
    if overall is None or overall["share"] is None:
        return "-"
    each = overall["share"], *(overall["interval"] or ())
    value, *ends = (f"{x:.0%}" if x > -0.995 else "<-99%" for x in each)  # the wrong side, far off
    return f"{value} [{', '.join(ends)}]" if ends and value != "<-99%" else value
