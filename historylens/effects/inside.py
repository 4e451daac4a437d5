"""What acts inside the model: heads that give something else, and transitions that are hidden.

    measured = measure_heads(trial, {0: [0, 1, 2, 3], 1: [0]})
    print(heads_text(measured)); measured["heads"][0]["mean"]["kl"]

A head's output, at all tokens, is replaced by its mean over decisions, and by what it gives under
another task's history (path patching, Wang et al. 2022, arXiv 2211.00593). Heads that back each
other up show only together: the row "all" of their layer. Hidden from the query alone, a transition
can still act through tokens that have read it; hidden from all tokens it cannot (attention
knockout, Geva et al. 2023, arXiv 2304.14767). Tokens of one transition go on seeing each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from historylens.agent import attend, run_heads
from historylens.common.batches import MAX_WEIGHTS
from historylens.common.errors import expect
from historylens.common.text import aligned, counted, listed, wrap
from historylens.compression.method import ages
from historylens.effects.measure import NOTHING, UNMOVED, Resampled, Trial, moved, nats
from historylens.effects.roles import roles_of
from historylens.tokens import NONE, PADDING, Tokens

KINDS = {"mean": "mean", "other-task": "another task's"}  # what a head's output is exchanged for
N_EXCHANGED = 24  # decisions, at most; fewer where what the heads give would not fit
N_SHOWN = 4  # heads on the console
RECENT = 10  # transitions: what is older is one of the sets
DIRECT = 0.5  # of the actions that change for all: as many change for the query alone if it reads
N_HIDDEN, N_HIDDEN_BY_LAYER = 32, 12  # decisions, at most
FROM = ("query", "all")  # tokens that the transitions are hidden from
OLDER = f"older than {RECENT}"
SETS = {
    "rewarded": lambda history: history.rewarded,
    "last episode": lambda history: history.episodes == history.episodes[:, -1:],
    OLDER: lambda history: ages(history) > RECENT,
    "same state": lambda history: history.same_state,
}


def measure_heads(trial: Trial, heads: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Effects and roles of heads of some layers, as plain values.

    UserError: the heads of none of them can be told apart, or there is one decision.
    """
    agent = trial.agent
    some = run_heads(agent, trial.history.rows(trial.decisions(2)))[1].values()
    n_numbers = sum(layer.output[0].numel() for layer in some)  # that all heads give
    rows = trial.decisions(max(2, min(N_EXCHANGED, MAX_WEIGHTS // max(1, n_numbers))))
    expect(len(rows) > 1, "expected two decisions or more, to have a mean of, got one")
    history = trial.history.rows(rows)
    full, own = run_heads(agent, history)
    what = "expected heads side by side, before a projection, in nn.MultiheadAttention, "
    what += "scaled_dot_product_attention or softmax(...) @ values, got none"
    expect({*own} & {*heads}, what)
    given = {"mean": {i: layer.output.mean(0, keepdim=True) for i, layer in own.items()}}
    if "other-task" not in trial.not_run:
        others = run_heads(agent, trial.exchanged("other-task", rows)[1])[1]
        given["other-task"] = {i: layer.output for i, layer in others.items()}
    resampled, shown = Resampled(len(rows), trial.generator("heads")), []
    tokens, actions = agent.tokens(history), full.argmax(-1).cpu().numpy()
    _, attention = attend(agent, history, [*heads])
    for (layer, chosen), seen in zip(heads.items(), attention, strict=True):
        if layer in own:
            read = seen.query_rows.numpy(), seen.visible.numpy(), tokens, history, actions
            roles, output = roles_of(*read), own[layer].output  # (B, H, T, d)
            number = torch.arange(output.shape[1], device=output.device)[:, None, None]
            for head in (*chosen, "all"):
                is_all = head == "all"
                entry = {"layer": layer, "head": head}
                entry |= {} if is_all else {"role": asdict(roles[head])}
                which = number >= 0 if is_all else number == head
                for kind, outputs in given.items():
                    change = {layer: partial(torch.where, which, outputs[layer])}
                    logits, _ = run_heads(agent, history, change)
                    entry[kind] = moved(full, logits, resampled, trial.beta)
                shown.append(entry)
        trial.bar.update()
    return {
        "samples": [trial.samples[i] for i in rows.tolist()],
        "note": "KL(full || changed), nats; changed: share of drawn actions that change at the "
        "reference temperature; each with its 95 % interval over decisions",
        "not_told_apart": [layer for layer in heads if layer not in own],
        "heads": shown,
    }


def heads_text(measured: Mapping[str, Any]) -> str:
    """The heads that move the action most, and what they read."""
    kinds = [kind for kind in KINDS if kind in measured["heads"][0]]
    single = [one for one in measured["heads"] if one["head"] != "all"]
    ranked = sorted(single, key=lambda one: -one[kinds[-1]]["kl"])
    title = f"WHICH HEADS ACT ({counted(len(measured['samples']), 'decision')})"
    table = [("head", "reads (evenly)", *(f"KL, {KINDS[kind]}" for kind in kinds), "flips")]
    for one in ranked[:N_SHOWN]:
        where = f"head-{one['layer']}-{one['head']}"  # as the strategy that keeps what it reads
        reads = "{name}: {share:.0%} ({even:.0%})".format(**one["role"])
        reads = "mixed" if one["role"]["name"] == "mixed" else reads
        cells = []
        for found in (one[kind] for kind in kinds):
            low, high = ("0" if x < NOTHING else nats(x) for x in found["kl_interval"])
            cells.append(f"{nats(found['kl'])} [{low}, {high}]")
        table.append((where, reads, *cells, f"{found['flips']:.0%}"))
    other = ", or for that under another task's history" if "other-task" in kinds else ""
    n_shown, of_all = len(table) - 1, counted(len(single), "head")
    legend = f"head-LAYER-HEAD: {n_shown} of {of_all}, by what happens when their output is "
    legend += f"exchanged for its mean{other}; KL in nats [95%]"
    lines = [title, *aligned(table, [0, 1]), wrap(legend)]
    if measured["not_told_apart"]:
        where = listed(measured["not_told_apart"])
        lines.append(wrap(f"The heads of {where} cannot be told apart: left out."))
    return "\n".join(lines)


def hidden_from(tokens: Sequence[Tokens], chosen: np.ndarray, from_all: bool) -> Tensor:
    """Keys `(B, T, T)` bool that hide `chosen (B, n)` transitions, from the query or all tokens."""
    number = np.stack([one.transition for one in tokens])  # (B, T)
    is_key = np.take_along_axis(chosen, number.clip(min=0), 1) & (number != NONE)
    is_query = np.stack([[part != PADDING for part in one.part] for one in tokens])
    if not from_all:  # the tokens of no transition, and the one that decides
        is_query &= number == NONE
        is_query[range(len(tokens)), [one.decides for one in tokens]] = True
    other = number[:, :, None] != number[:, None, :]
    return torch.from_numpy(is_query[:, :, None] & is_key[:, None, :] & other)


def measure_knockout(trial: Trial, layers: Iterable[int]) -> dict[str, Any]:
    """What hiding each of `SETS` does, in all layers and in each of some, as plain values.

    UserError: some layer's attention cannot be blocked, or no two decisions have such transitions.
    """
    agent, found = trial.agent, {}
    told = run_heads(agent, trial.history.rows(trial.decisions(2)))[1]
    where = "attention to some tokens can only be blocked where"
    expect(len(told) == len(agent.layers), f"{where} heads are told apart")
    expect(agent.sees_all, f"{where} all that mixes tokens is looked at: some layers are not")
    for name, rule in SETS.items():
        if name != "last episode" or trial.history.episodes is not None:
            chosen = rule(trial.history)  # (B, n)
            having = torch.nonzero(chosen.any(1))[:, 0]
            if len(having) > 1:
                found[name] = _measure_set(trial, chosen, having, [*layers])
        trial.bar.update()
    expect(found, "expected two decisions or more with such transitions before them, got fewer")
    return {
        "note": "KL(full || with these transitions hidden), nats, of the decisions that have some; "
        "layers: hidden in one layer alone",
        "sets": found,
    }


def _measure_set(trial: Trial, chosen: Tensor, having: Tensor, layers: Sequence[int]) -> dict:
    """A set of transitions `(B, n)`, in the decisions that have some."""
    result: dict[str, Any] = {"n_mean": float(chosen[having].sum(1).double().mean())}
    every = [range(len(trial.agent.layers))]
    for limit, parts in ((N_HIDDEN, every), (N_HIDDEN_BY_LAYER, [[i] for i in layers])):
        rows = having[torch.linspace(0, len(having) - 1, min(limit, len(having))).long()]
        history = trial.history.rows(rows)
        resampled = Resampled(len(rows), trial.generator("knockout"))
        tokens, own = trial.agent.tokens(history), chosen[rows].cpu().numpy()
        for key in FROM:
            hidden = hidden_from(tokens, own, key == "all").to(history.device)
            found = []
            for part in parts:
                logits, _ = run_heads(trial.agent, history, hide=dict.fromkeys(part, hidden))
                found.append(moved(trial.full[rows], logits, resampled, trial.beta))
            if parts is every:
                result[key] = {"samples": [trial.samples[i] for i in rows.tolist()], **found[0]}
            else:
                result[key]["layers"] = dict(zip(layers, found, strict=True))
    alone, whole = (result[key]["changed"] for key in FROM)
    verdict = "read by the query itself" if alone >= DIRECT * whole else "read through other tokens"
    return result | {"verdict": "not needed" if max(alone, whole) <= UNMOVED else verdict}


def knockout_text(measured: Mapping[str, Any], n: int) -> str:
    """A line a set: what hiding it from the query, and from all tokens, does."""
    table = [("hidden", f"of {n}", "from the query", "from all tokens", "so they are")]
    for name, one in measured["sets"].items():
        cells = [f"KL {nats(one[k]['kl'])}, flips {one[k]['flips']:.0%}" for k in FROM]
        table.append((name, f"{one['n_mean']:.0f}", *cells, one["verdict"]))
    sizes = sorted(len(one["all"]["samples"]) for one in measured["sets"].values())
    sizes = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    legend = f"attention to them is blocked in all layers, in {sizes} decisions; through other "
    legend += "tokens: hiding them from the query alone changes less than half as much; judged at "
    legend += "the reference temperature"
    return "\n".join(["READ DIRECTLY, OR COPIED BEFORE?", *aligned(table, [0, 4]), wrap(legend)])


def copied(measured: Mapping[str, Any] | None) -> str | None:
    """What to bear in mind where distant history is to be dropped; None if nothing."""
    one = (measured or {"sets": {}})["sets"].get(OLDER)
    if one is None or one["verdict"] != "read through other tokens":
        return None
    whole, alone = (nats(one[key]["kl"]) for key in ("all", "query"))
    text = f"What is {OLDER} transitions acts through newer tokens that have read it (KL {whole} "
    text += f"when no token can see it, {alone} when only the query cannot): dropping it takes "
    return text + "that too."
