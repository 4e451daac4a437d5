"""Does an adapter describe its model? A few passes show it, before anything is written."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from historylens.agent import where_of
from historylens.capture import CaptureError, Record, capture
from historylens.capture.probes import disturbed, mixing_modules
from historylens.common.errors import UserError, expect
from historylens.history import History

if TYPE_CHECKING:
    from historylens.adapter.agent import AdapterAgent


def tried(agent: "AdapterAgent") -> tuple[Record, dict[str, str]]:
    """A captured pass, and modules beside its layers that mix tokens, with their classes.

    UserError: act() fails, samples and heads are not told apart, or changing one action or the last
    layer's output shows that the map of tokens is not the model's. What raises is passed over.
    """
    history, said, unseen = agent.history([0]), None, {}
    given = "tokens()" if agent.adapter.get("tokens") is not None else "no tokens(), so"
    same = [i for i, one in enumerate(agent.decisions) if one.n == history.n] * 3
    record = _first_pass(agent, agent.history(same[:3]), given)
    checks = {_swapped: "CAPTURE", _fed_elsewhere: given, _decided_elsewhere: given}
    for wrong, told in checks.items():
        with suppress(Exception):
            said = wrong(agent, history, record)
        expect(said is None, f"{agent.adapter.path}: {told} {said}")
    with suppress(Exception):
        known, run = [*record.names, *record.places], lambda: agent.act(history)
        unseen = mixing_modules(agent.model, known, len(agent.tokens(history)[0]), run)
    return record, unseen


def _first_pass(agent: "AdapterAgent", history: History, given: str) -> Record:
    """Fit adapter and model? Where a pass fails, one without the map tells whether that is why."""
    where, misled = where_of(maps := agent.tokens(history)), None
    try:
        record = _passed(agent, history, **where)
    except UserError as error:
        if not where or not isinstance(error.__cause__, CaptureError):
            raise
        record, misled = _passed(agent, history), error
    check, own = agent.adapter.check, len(maps[0])
    sizes = {layer.name: layer.query_rows.shape[-1] for layer in record}
    fitting = [name for name, size in sizes.items() if size == own]
    more = f", over which {fitting[0]} does; layers(model) may give such layers" if fitting else ""
    before = f"(with {history.n} transitions before the decision)"
    for name, size in sizes.items():
        expected = f"a map of the {size} tokens that {name} attends over {before}"
        check(size == own, given, expected, f"one of {own} tokens{more}")
    for name, seen in ((name, seen) for name, seen in record.calls.items() if seen):
        (n_samples, n_heads, _), n_queries = seen.layer.query_rows.shape, seen.n_queries
        expected = f"layers where all {own} tokens attend, or only the one that decides"
        found = f"{name}, where {n_queries} do (in {n_heads} heads)"
        check(n_queries in (1, own), "layers()", f"{expected}; scores are (B, H, Tq, Tk)", found)
        expected = f"attention (B, H, Tq, Tk) of the {history.size} histories in the batch"
        found = f"B = {n_samples} and H = {n_heads} in {name}; record_attention() takes other axes"
        check(n_samples == history.size, "act()", expected, f"{found} once they are in order")
    if misled is not None:
        raise misled
    return record


def _passed(agent: "AdapterAgent", history: History, **options: Any) -> Record:
    options |= {"received": False, **agent.capture_options}
    with agent.adapter.blamed("act()"), capture(agent.model, **options) as record:
        agent.act(history)
    return record


def _swapped(agent: "AdapterAgent", history: History, record: Record) -> str | None:
    """What is wrong where attention of 3 axes holds samples within heads."""
    if "heads" not in agent.capture_options:
        return None
    alone = _passed(agent, history, **where_of(agent.tokens(history)))
    for own, layer in zip(alone, record, strict=True):
        rows = layer.query_rows  # (B, H, T)
        turned = rows.flatten(0, 1).unflatten(0, (-1, len(rows))).transpose(0, 1)
        error, other = ((x[:1] - own.query_rows).abs().max() for x in (rows, turned))
        if error > 1e-5 and other < error / 10:
            return (
                f"gives heads of attention over (B * H, T, T), but that of {layer.name} is over "
                "(H * B, T, T), samples within heads: bring its scores to (B, H, T, T), or hand "
                "its weights in so: historylens.record_attention(name, weights)"
            )
    return None


def _fed_elsewhere(agent: "AdapterAgent", history: History, _record: Record) -> str | None:
    """What is wrong where another action does not change the tokens of its transition."""
    number, tokens = history.n // 2, agent.tokens(history)
    known = {int(action) for one in agent.decisions for action in one.actions}
    pair = agent.history([0, 0])
    pair.actions[1, number] = min(known - {int(pair.actions[0, number])})
    fed = _passed(agent, pair, inputs=True, **where_of(tokens * 2))[0].inputs.double()  # (2, T, F)
    moved = (fed[0] - fed[1]).abs().amax(1) > 1e-5 * fed.abs().max()
    own = torch.from_numpy(tokens[0].transition == number)
    if not moved.any() or (moved & own).any():
        return None
    where, mapped = (int(x.nonzero()[0]) for x in (moved, own))
    said = f"has token {mapped} of transition {number}, whose action changes token {where} instead"
    if where < mapped:
        return f"{said}: Tokens.of(history.n) has a token a transition in order, the query behind"
    return (
        f"{said}; a model of (previous action, previous reward, state) is Tokens.of(history.n, "
        'parts=("previous action", "previous reward", "state")), or ("previous transition",)'
    )


def _decided_elsewhere(agent: "AdapterAgent", history: History, record: Record) -> str | None:
    """What is wrong where the output of the token that decides does not reach the logits."""
    tokens, logits, last = agent.tokens(history)[0], agent.act(history), record.names[-1]
    if record.calls[last].n_queries < len(tokens):  # its only query decides
        return None

    def matters(row: int | None) -> bool:
        with disturbed(agent.model, last, row, **agent.capture_options):
            return bool((agent.act(history) - logits).abs().max() > 1e-6 * logits.abs().max())

    if not matters(None) or matters(tokens.decides):
        return None
    found = next((i for i in reversed(range(len(tokens))) if matters(i)), "another")
    return (
        f"has token {tokens.decides} decide, but what {last} gives it does not change the logits; "
        f"token {found} does: expected Tokens.of(..., decides={found})"
    )
