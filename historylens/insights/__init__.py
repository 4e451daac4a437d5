"""Numbers -> patterns -> advice: what attention suggests about compressing history.

Four rules with fixed thresholds, applied to the head-averaged attention row of every layer and
sample. The thresholds are absolute, so each insight also says where the length of the context makes
them mislead, and none of them proves anything: only dropping the history and watching the action
does.

    for insight in find_patterns(metrics):
        print(insight.headline, insight.evidence, insight.caveat or "")
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from historylens.common.text import listed
from historylens.insights.patterns import BROAD_SHARE, PATTERNS, UNIFORM_ENTROPY, Scope
from historylens.metrics import Metrics


@dataclass(frozen=True)
class Insight:
    """A pattern that holds, what was measured, and what to make of it.

    Attributes:
        pattern: key of `PATTERNS`.
        layer: number of the layer, or None where it holds over all layers together.
        headline: the line that announces it.
        advice: one sentence, shown below the headline.
        evidence: what was measured, against the threshold and against even reading.
        caveat: where the length of the context makes the absolute rule mislead, else None.
        by_rule_only: the length-normalised figures say otherwise (the caveat says how).
        strategies: ways of compressing history that fit the pattern.
        example: one of them with numbers.
        measured: the numbers behind the sentences.
        effect: what dropping that history did to the action, once somebody has measured it;
            attach it with `dataclasses.replace(insight, effect=...)`.
    """

    pattern: str
    layer: int | None
    headline: str
    advice: str
    meaning: str
    evidence: str
    caveat: str | None
    by_rule_only: bool
    strategies: tuple[str, ...]
    example: str
    measured: dict[str, float] = field(default_factory=dict)
    effect: str | None = None


def scopes(metrics: Metrics) -> list[Scope]:
    """All layers together first, then every layer."""
    return [Scope.of(metrics, place) for place in (None, *range(len(metrics.layers)))]


def verdicts(scope: Scope) -> dict[str, tuple[float, bool]]:
    """Pattern -> (the figure its rule looks at, whether the rule holds)."""
    figures = {name: pattern.figure(scope) for name, pattern in PATTERNS.items()}
    return {name: (figure, PATTERNS[name].rule(figure)) for name, figure in figures.items()}


def find_patterns(metrics: Metrics) -> list[Insight]:
    """Every pattern that holds over all layers together, then those that hold in some layer only.

    Args:
        metrics: of all samples.

    Returns:
        Insights in the order of `PATTERNS`; those of a layer (in layer order) only where the
        pattern does not hold over all layers together.
    """
    overall, *per_layer = scopes(metrics)
    found = {name for name, (_, holds) in verdicts(overall).items() if holds}
    insights = []
    for name in PATTERNS:
        holding = [s.layer for s in per_layer if verdicts(s)[name][1]]
        if name in found:
            agreement = _layer_agreement(holding, [s.layer for s in per_layer])
            sharpest = _sharpest_head(metrics) if name == "uniform" and overall.is_broad else ""
            insights.append(_insight(name, overall, sharpest + agreement))
        else:
            insights += [_insight(name, s) for s in per_layer if s.layer in holding]
    return sorted(insights, key=lambda insight: insight.layer is not None)


def _insight(name: str, scope: Scope, more: str = "") -> Insight:
    pattern = PATTERNS[name]
    caveat, by_rule_only = pattern.caveat(scope)
    where = "" if scope.layer is None else f" in layer {scope.layer}"
    doubt = " (by the absolute rule only)" if by_rule_only else ""
    evidence, measured = pattern.evidence(scope)
    return Insight(
        pattern=name,
        layer=scope.layer,
        headline=f"💡 INSIGHT: {pattern.title} detected{where}!{doubt}",
        advice=pattern.advice,
        meaning=pattern.meaning,
        evidence=evidence + more,
        caveat=caveat,
        by_rule_only=by_rule_only,
        strategies=pattern.strategies,
        example=pattern.example,
        measured=measured,
    )


def _sharpest_head(metrics: Metrics) -> str:
    """A sentence where the head average hides a head that picks from the history."""
    shares = [
        (float((values / metrics.n_context).mean()), layer, head, float(values.mean()))
        for place, layer in enumerate(metrics.layers)
        for head, values in zip(
            metrics.heads[place], metrics.of_heads("effective_tokens", place).T, strict=True
        )
    ]
    share, layer, head, tokens = min(shares)
    if share >= BROAD_SHARE:
        return ""
    return f" Single heads are sharper: head {head} of layer {layer} reads {tokens:.1f} in effect."


def _layer_agreement(holding: Sequence[int], layers: Sequence[int]) -> str:
    """A sentence that says in which layers a pattern of the whole model holds."""
    if len(layers) == 1:
        return ""
    if len(holding) == len(layers):
        return " It holds in every layer."
    others = [layer for layer in layers if layer not in holding]
    return f" It holds in {listed(holding)}, not in {listed(others)}."


def remarks(metrics: Metrics) -> list[str]:
    """What the rules cannot say at this context length, or miss: one sentence each."""
    overall = scopes(metrics)[0]
    found = {name for name, (_, holds) in verdicts(overall).items() if holds}
    even, entropy = float(overall.uniform["entropy"].mean()), overall.mean("entropy")
    if overall.n.max() == 1:
        return [
            "With one context token there is nothing to choose from: the recent/distant ratio is 1 "
            "and the entropy below 0.37 nats whatever the model does."
        ]
    if "uniform" not in found and even <= UNIFORM_ENTROPY:
        spread = "broad" if overall.is_broad else "narrow"
        return [
            f"Uniform attention cannot be recognised by its threshold at {overall.length}: reading "
            f"every token equally gives an entropy of {even:.2f} nats, not above "
            f"{UNIFORM_ENTROPY}. For its length attention is {spread}: {overall.normalised}."
        ]
    if "uniform" not in found and overall.is_broad:
        return [
            f"The entropy of {entropy:.2f} nats is not above {UNIFORM_ENTROPY}, yet what the model "
            f"gives to its history is spread broadly: {overall.normalised}."
        ]
    return []
