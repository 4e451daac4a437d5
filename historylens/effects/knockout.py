"""Read directly, or copied before? Attention to some transitions is blocked, positions unchanged.

    measured = measure_knockout(trial, layers=[0, 1], bar=tqdm())
    print(knockout_text(measured)); measured["sets"]["rewarded"]["query"]["kl"]

Hidden from the query alone, a transition can still act through tokens that have read it; hidden
from all tokens it cannot (attention knockout, Geva et al. 2023, arXiv 2304.14767). Tokens of one
transition go on seeing each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from historylens.agent import run_heads
from historylens.common.errors import expect
from historylens.common.text import aligned, wrap
from historylens.effects.measure import UNMOVED, Resampled, Trial, moved, nats
from historylens.tokens import NONE, PADDING, Tokens

RECENT = 10  # transitions: what is older is one of the sets
DIRECT = 0.5  # of the actions that change for all: as many change for the query alone if it reads
N_DECISIONS, N_DECISIONS_BY_LAYER = 32, 12  # at most
FROM = ("query", "all")  # tokens that the transitions are hidden from
SETS = {
    "rewarded": lambda history: history.rewarded,
    "last episode": lambda history: history.episodes == history.episodes[:, -1:],
    f"older than {RECENT}": lambda history: (
        torch.arange(history.n, 0, -1, device=history.device).expand(history.size, -1) > RECENT
    ),
    "same state": lambda history: history.same_state,
}


def hidden_from(
    tokens: Sequence[Tokens], chosen: np.ndarray, from_all: bool, device: torch.device
) -> Tensor:
    """Keys `(B, T, T)` bool that hide `chosen (B, n)` transitions, from the query or all tokens."""
    number = np.stack([one.transition for one in tokens])  # (B, T)
    is_key = np.take_along_axis(chosen, number.clip(min=0), 1) & (number != NONE)
    is_query = np.stack([[part != PADDING for part in one.part] for one in tokens])
    if not from_all:  # the tokens of no transition, and the one that decides
        is_query &= number == NONE
        is_query[range(len(tokens)), [one.decides for one in tokens]] = True
    other = number[:, :, None] != number[:, None, :]
    return torch.from_numpy(is_query[:, :, None] & is_key[:, None, :] & other).to(device)


def measure_knockout(trial: Trial, layers: Sequence[int], bar: tqdm) -> dict[str, Any]:
    """What hiding each of `SETS` does, in all layers and in each of some, as plain values.

    `bar` moves on by 1 a set. UserError: the attention of some layer cannot be blocked, or no two
    decisions have such transitions.
    """
    agent, found = trial.agent, {}
    told = run_heads(agent, trial.history.rows(trial.decisions(1)))[1]
    every = range(len(agent.layers))
    where = "attention to some tokens can only be blocked where"
    expect(len(told) == len(every), f"{where} heads are told apart")
    expect(agent.sees_all, f"{where} all that mixes tokens is looked at: some layers are not")
    for name, rule in SETS.items():
        if name != "last episode" or trial.history.episodes is not None:
            found[name] = _measure_set(trial, rule(trial.history), layers, every)
        bar.update()
    found = {name: one for name, one in found.items() if one is not None}
    expect(found, "expected two decisions or more with such transitions before them, got fewer")
    return {
        "note": "KL(full || with these transitions hidden), nats, of the decisions that have some; "
        "layers: hidden in one layer alone",
        "sets": found,
    }


def _measure_set(
    trial: Trial, chosen: Tensor, layers: Sequence[int], every: Sequence[int]
) -> dict[str, Any] | None:
    """A set of transitions `(B, n)`; None where no two decisions have some."""
    having = torch.nonzero(chosen.any(1))[:, 0]
    if len(having) < 2:
        return None
    result: dict[str, Any] = {"n_mean": float(chosen[having].sum(1).double().mean())}
    for limit, parts in ((N_DECISIONS, [every]), (N_DECISIONS_BY_LAYER, [[i] for i in layers])):
        rows = having[torch.linspace(0, len(having) - 1, min(limit, len(having))).long()]
        history = trial.history.rows(rows)
        resampled = Resampled(len(rows), trial.generator("knockout"))
        tokens, own = trial.agent.tokens(history), chosen[rows].cpu().numpy()
        for key in FROM:
            hidden = hidden_from(tokens, own, key == "all", history.device)
            found = []
            for part in parts:
                logits, _ = run_heads(trial.agent, history, hide=dict.fromkeys(part, hidden))
                found.append(moved(trial.full[rows], logits, resampled, trial.beta))
            if parts == [every]:
                result[key] = {"samples": [trial.samples[i] for i in rows.tolist()], **found[0]}
            else:
                result[key]["layers"] = dict(zip(layers, found, strict=True))
    alone, whole = (result[key]["changed"] for key in FROM)
    verdict = "read by the query itself" if alone >= DIRECT * whole else "read through other tokens"
    return result | {"verdict": "not needed" if max(alone, whole) <= UNMOVED else verdict}


def knockout_text(measured: Mapping[str, Any], n: int) -> str:
    """A line a set: what hiding it from the query, and from all tokens, does."""
    table = [("hidden", "of " + str(n), "from the query", "from all tokens", "so they are")]
    for name, one in measured["sets"].items():
        cells = [f"KL {nats(one[k]['kl'])}, flips {one[k]['flips']:.0%}" for k in FROM]
        table.append((name, f"{one['n_mean']:.0f}", *cells, one["verdict"]))
    sizes = sorted(len(one["all"]["samples"]) for one in measured["sets"].values())
    sizes = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    legend = (
        f"attention to them is blocked in all layers, in {sizes} decisions; "
        "through other tokens: hiding them from the query alone changes less than half as much; "
        "judged at the reference temperature"
    )
    return "\n".join(["READ DIRECTLY, OR COPIED BEFORE?", *aligned(table, [0, 4]), wrap(legend)])


def copied(measured: Mapping[str, Any] | None) -> str | None:
    """What to bear in mind where distant history is to be dropped; None if nothing."""
    one = (measured or {"sets": {}})["sets"].get(f"older than {RECENT}")
    if one is None or one["verdict"] != "read through other tokens":
        return None
    return (
        f"What is older than {RECENT} transitions acts through newer tokens that have read it (KL "
        f"{nats(one['all']['kl'])} when no token can see it, {nats(one['query']['kl'])} when only "
        "the query cannot): dropping it takes that too."
    )
