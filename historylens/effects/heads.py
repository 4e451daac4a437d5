"""Which heads act: how far the action moves when what a head gives is exchanged, and what it reads.

    measured = measure_heads(trial, layers=[0, 1], heads=[[0, 1, 2, 3]] * 2, bar=tqdm())
    print(heads_text(measured)); measured["heads"][0]["mean"]["kl"]

A head's output, at all tokens, is replaced by its mean over decisions, and by what it gives under
another task's history, so that only what it has read is exchanged (path patching, Wang et al. 2022,
arXiv 2211.00593). Heads that back each other up show only together: the row "all" of their layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from tqdm import tqdm

from historylens.agent import attend, run_heads
from historylens.common.batches import MAX_WEIGHTS
from historylens.common.errors import expect
from historylens.common.text import aligned, counted, listed, wrap
from historylens.effects.measure import NOTHING, Resampled, Trial, moved, nats
from historylens.effects.roles import roles_of

KINDS = {"mean": "mean", "other-task": "another task's"}
N_DECISIONS = 24  # at most; fewer where what the heads give would not fit
N_SHOWN = 4  # heads on the console


def measure_heads(
    trial: Trial, layers: Sequence[int], heads: Sequence[Sequence[int]], bar: tqdm
) -> dict[str, Any]:
    """Effects and roles of heads, as plain values; `bar` moves on by 1 a layer.

    UserError: the heads of none of them can be told apart, or there is one decision.
    """
    rows = _affordable(trial)
    expect(len(rows) > 1, "expected two decisions or more, to have a mean of, got one")
    history = trial.history.rows(rows)
    full, own = run_heads(trial.agent, history)
    what = "expected heads side by side, before a projection, in nn.MultiheadAttention, "
    what += "scaled_dot_product_attention or softmax(...) @ values, got none"
    expect({*own} & {*layers}, what)
    given = {"mean": {i: layer.output.mean(0, keepdim=True) for i, layer in own.items()}}
    if "other-task" not in trial.not_run:
        _, donors = trial.exchanged("other-task", rows)
        others = run_heads(trial.agent, donors)[1]
        given["other-task"] = {i: layer.output for i, layer in others.items()}
    resampled = Resampled(len(rows), trial.generator("heads"))
    tokens, actions = trial.agent.tokens(history), full.argmax(-1).cpu().numpy()
    _, attention = attend(trial.agent, history, layers)
    shown = []
    for layer, chosen, seen in zip(layers, heads, attention, strict=True):
        read = seen.query_rows.numpy(), seen.visible.numpy(), tokens, history, actions
        roles = dict(enumerate(roles_of(*read))) if layer in own else {}
        for head in (*chosen, "all") if roles else ():
            entry = {"layer": layer, "head": head}
            entry |= {"role": asdict(roles[head])} if head in roles else {}
            for kind, outputs in given.items():
                change = {layer: _exchange(head, outputs[layer])}
                logits, _ = run_heads(trial.agent, history, change)
                entry[kind] = moved(full, logits, resampled, trial.beta)
            shown.append(entry)
        bar.update()
    return {
        "samples": [trial.samples[i] for i in rows.tolist()],
        "note": "KL(full || changed), nats; changed: share of drawn actions that change at the "
        "reference temperature; each with its 95 % interval over decisions",
        "not_told_apart": [layer for layer in layers if layer not in own],
        "heads": shown,
    }


def _affordable(trial: Trial) -> Tensor:
    """Decisions whose outputs of all heads can be held at once."""
    one = trial.decisions(1)
    layers = run_heads(trial.agent, trial.history.rows(one))[1].values()
    n_numbers = sum(layer.output.numel() for layer in layers)
    return trial.decisions(max(2, min(N_DECISIONS, MAX_WEIGHTS // max(1, n_numbers))))


def _exchange(head: int | str, given: Tensor) -> Any:
    """A change that gives the outputs `(B or 1, H, T, d)` of a head instead of its own."""

    def change(output: Tensor) -> Tensor:
        which = slice(None) if head == "all" else head
        output = output.clone()
        output[:, which] = given[:, which]
        return output

    return change


def heads_text(measured: Mapping[str, Any]) -> str:
    """The heads that move the action most, and what they read."""
    kinds = [kind for kind in KINDS if kind in measured["heads"][0]]
    single = [one for one in measured["heads"] if one["head"] != "all"]
    ranked = sorted(single, key=lambda one: -one[kinds[-1]]["kl"])
    n, n_all = len(measured["samples"]), len(single)
    title = f"WHICH HEADS ACT ({counted(n, 'decision')})"
    table = [("head", "reads (evenly)", *(f"KL, {KINDS[kind]}" for kind in kinds), "flips")]
    for one in ranked[:N_SHOWN]:
        where = f"head-{one['layer']}-{one['head']}"  # as the strategy that keeps what it reads
        numbers = [f"{nats(one[k]['kl'])} {_ends(one[k]['kl_interval'])}" for k in kinds]
        role = one["role"]
        reads = "{name}: {share:.0%} ({even:.0%})".format(**role)
        reads = role["name"] if role["name"] == "mixed" else reads
        table.append((where, reads, *numbers, f"{one[kinds[-1]]['flips']:.0%}"))
    other = ", or for that under another task's history" if "other-task" in kinds else ""
    legend = (
        f"head-LAYER-HEAD: {min(N_SHOWN, n_all)} of {counted(n_all, 'head')}, by what happens when "
        f"their output is exchanged for its mean{other}; KL in nats [95%]"
    )
    lines = [title, *aligned(table, [0, 1]), wrap(legend)]
    if measured["not_told_apart"]:
        where = listed(measured["not_told_apart"])
        lines.append(wrap(f"The heads of {where} cannot be told apart: left out."))
    return "\n".join(lines)


def _ends(interval: Sequence[float]) -> str:
    return "[{}, {}]".format(*("0" if x < NOTHING else nats(x) for x in interval))
