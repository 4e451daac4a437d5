"""Numbers -> patterns -> advice: what attention suggests about compressing history.

    for insight in find_patterns(metrics):
        print(insight.headline, insight.evidence, insight.caveat or "")

Four rules with absolute thresholds. None proves anything: only dropping the history does.
"""

from dataclasses import dataclass

import numpy as np

from historylens.common.text import listed
from historylens.insights.patterns import BROAD_SHARE, PATTERNS, UNIFORM_ENTROPY, Scope
from historylens.metrics import NAMES, Metrics


@dataclass(frozen=True)
class Insight:
    """A pattern that holds, what was measured, and what to make of it."""

    pattern: str  # key of PATTERNS
    layer: int | None  # number of the layer; None where it holds over all layers together
    headline: str
    advice: str
    meaning: str
    evidence: str  # what was measured, against the threshold and against even reading
    caveat: str | None  # where the length of the context makes the absolute rule mislead
    by_rule_only: bool  # the length-normalised figures say otherwise; the caveat says how
    strategies: tuple[str, ...]
    example: str
    measured: dict[str, float]  # the numbers behind the sentences
    effect: str | None = None  # what dropping that history did to the action, once measured


def scopes(metrics: Metrics) -> list[Scope]:
    """All layers together first, then every layer, whose values are views of the first's."""
    values = {name: metrics.of(name) for name in NAMES}  # (L, S) each
    rest = {name: metrics.of_uniform(name) for name in NAMES}, metrics.n_context
    return [Scope(None, values, *rest)] + [
        Scope(layer, {name: each[place] for name, each in values.items()}, *rest)
        for place, layer in enumerate(metrics.layers)
    ]


def holding(scope: Scope) -> list[str]:
    """Names of the patterns that hold."""
    return [name for name, pattern in PATTERNS.items() if pattern.rule(scope)]


def find_patterns(metrics: Metrics) -> list[Insight]:
    """Patterns that hold over all layers together, then those that hold in some layer only."""
    overall, *per_layer = scopes(metrics)
    whole, in_layers = [], []
    for name, pattern in PATTERNS.items():
        agree = [scope for scope in per_layer if pattern.rule(scope)]
        if not pattern.rule(overall):
            in_layers += [_insight(name, scope) for scope in agree]
            continue
        more = _sharpest_head(metrics) if name == "uniform" and overall.is_broad else ""
        layers = [scope.layer for scope in agree]
        others = [layer for layer in metrics.layers if layer not in layers]
        if others:
            more += f" It holds in {listed(layers)}, not in {listed(others)}."
        elif len(layers) > 1:
            more += " It holds in every layer."
        whole.append(_insight(name, overall, more))
    return whole + in_layers


def _insight(name: str, scope: Scope, more: str = "") -> Insight:
    pattern = PATTERNS[name]
    evidence, measured, caveat, by_rule_only = pattern.read(scope)
    headline = f"💡 INSIGHT: {pattern.title} detected"
    headline += "!" if scope.layer is None else f" in layer {scope.layer}!"
    headline += " (by the absolute rule only)" if by_rule_only else ""
    said = (headline, pattern.advice, pattern.meaning, evidence + more, caveat, by_rule_only)
    return Insight(name, scope.layer, *said, pattern.strategies, pattern.example, measured)


def _sharpest_head(metrics: Metrics) -> str:
    """A sentence where the head average hides a head that picks from the history."""
    tokens = metrics.values[:, :, :-1, NAMES.index("effective_tokens")]  # (S, L, H)
    shares = (tokens / np.maximum(metrics.n_context, 1)[:, None, None]).mean(0)
    place, i = np.unravel_index(np.nanargmin(shares), shares.shape)
    if shares[place, i] >= BROAD_SHARE:
        return ""
    where = f"head {metrics.heads[place][i]} of layer {metrics.layers[place]}"
    return f" Single heads are sharper: {where} reads {tokens[:, place, i].mean():.1f} in effect."


def remarks(metrics: Metrics) -> list[str]:
    """What the rules cannot say at this context length, or miss: one sentence each."""
    overall = scopes(metrics)[0]
    entropy, is_uniform = overall.mean("entropy"), PATTERNS["uniform"].rule(overall)
    even, text = float(overall.uniform["entropy"].mean()), ""
    if overall.n.max() == 0:
        text = "Without a history there is nothing to read but the query itself."
    elif overall.n.max() == 1:
        text = "With one context token there is nothing to choose from: the recent/distant ratio "
        text += "is 1 and the entropy below 0.37 nats whatever the model does."
    elif not is_uniform and even <= UNIFORM_ENTROPY:
        spread = "broad" if overall.is_broad else "narrow"
        text = f"Uniform attention cannot be recognised by its threshold at {overall.length}: "
        text += f"reading every token equally gives an entropy of {even:.2f} nats, not above "
        text += f"{UNIFORM_ENTROPY}. For its length attention is {spread}: {overall.normalised}."
    elif not is_uniform and overall.is_broad:
        text = f"The entropy of {entropy:.2f} nats is not above {UNIFORM_ENTROPY}, yet what the "
        text += f"model gives to its history is spread broadly: {overall.normalised}."
    return [text] if text else []
