"""Does an adapter describe its model? A few more passes show it, before anything is written.

    check_tokens(agent, layers)               # UserError: the map of tokens is not the model's
    unseen = unseen_modules(agent, layers)    # what mixes tokens, but is no attention that is seen

What cannot be tried, because it raises or its numbers do not fit, is passed over.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from historylens.agent import where_of
from historylens.capture import capture
from historylens.capture.probes import disturbed, mixing_modules
from historylens.common.errors import expect
from historylens.history import History

if TYPE_CHECKING:
    from historylens.adapter.agent import AdapterAgent

PREVIOUS = '("previous action", "previous reward", "state")'


def check_tokens(agent: "AdapterAgent", layers: Sequence[str]) -> None:
    """Check what an adapter says of tokens by changing one action, and the last layer's output."""
    history, said = agent.history([0]), None
    for wrong in (_fed_elsewhere, _decided_elsewhere):
        with suppress(Exception):
            said = wrong(agent, history, layers)
        given = "tokens()" if agent.adapter.get("tokens") is not None else "no tokens(), so"
        expect(said is None, f"{agent.adapter.path}: {given} {said}")


def unseen_modules(agent: "AdapterAgent", layers: Sequence[str]) -> dict[str, str]:
    """Modules beside the `layers` that mix tokens, and their classes."""
    with suppress(Exception):
        history = agent.history([0])
        tokens = agent.tokens(history)
        options = {"received": False, **where_of(tokens), **agent.capture_options}
        with capture(agent.model, **options) as record:
            agent.act(history)
        known, run = [*layers, *record.places], lambda: agent.act(history)
        return mixing_modules(agent.model, known, len(tokens[0]), run)
    return {}


def _fed_elsewhere(agent: "AdapterAgent", history: History, _layers: Sequence[str]) -> str | None:
    """What is wrong where another action does not change the tokens of its transition."""
    number = history.n // 2
    known = {int(action) for one in agent.decisions for action in one.actions}
    pair = history.rows(torch.zeros(2, dtype=torch.long, device=history.device))
    actions = pair.actions.clone()
    actions[1, number] = min(known - {int(actions[0, number])})
    tokens = agent.tokens(pair)
    options = {"received": False, "inputs": True, **where_of(tokens), **agent.capture_options}
    with capture(agent.model, **options) as record:
        agent.act(replace(pair, actions=actions))
    fed = record[0].inputs.double()  # (2, T, F)
    moved = (fed[0] - fed[1]).abs().amax(1) > 1e-5 * fed.abs().max()
    own = torch.from_numpy(tokens[0].transition == number)
    if not moved.any() or (moved & own).any():
        return None
    where, mapped = (int(x.nonzero()[0]) for x in (moved, own))
    return (
        f"has token {mapped} of transition {number}, whose action changes token {where} instead; "
        "a model that reads (previous action, previous reward, state) is described by "
        f"Tokens.of(history.n, parts={PREVIOUS}), or parts=('previous transition',) where these "
        "are one token"
    )


def _decided_elsewhere(
    agent: "AdapterAgent", history: History, layers: Sequence[str]
) -> str | None:
    """What is wrong where the output of the token that decides does not reach the logits."""
    tokens, logits = agent.tokens(history)[0], agent.act(history)

    def matters(row: int | None) -> Tensor:
        with disturbed(agent.model, layers[-1], row, **agent.capture_options):
            changed = agent.act(history)
        return (changed - logits).abs().max() > 1e-6 * logits.abs().max()

    if not matters(None) or matters(tokens.decides):
        return None
    found = next((i for i in reversed(range(len(tokens))) if matters(i)), "another")
    return (
        f"has token {tokens.decides} decide, but what {layers[-1]} gives it does not change the "
        f"logits; token {found} does: expected Tokens.of(..., decides={found})"
    )
