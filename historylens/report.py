"""Numbers -> console text of at most 100 columns, `metrics.json` and `metrics.csv`.

print(layer_table(metrics))
write_atomically(out / "metrics.json", metrics_json(metrics, agent.decisions, ...))
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from historylens.common.files import rounded
from historylens.common.text import aligned, cap, counted, listed, wrap
from historylens.history import Decision
from historylens.insights import Insight, holding, remarks, scopes
from historylens.insights.patterns import PATTERNS
from historylens.metrics import DESCRIPTIONS, NAMES, Metrics, uniform_received
from historylens.tokens import Tokens

SCHEMA_VERSION = 1
FOUR = "{:z.4f}".format  # no negative zero
PARTED = 0.1  # mean and median differ by more than this share: the median is shown as well


def layer_table(metrics: Metrics) -> str:
    """The metrics of every layer: mean ± std over samples, uniform attention in the last row."""
    n, samples = scopes(metrics)[0].length, counted(metrics.n_samples, "sample")
    title = f"METRICS PER LAYER (mean ± std over samples; {n} context tokens, {samples})"
    names = ("mean attention", "concentration", "entropy", "/ ln n", "tokens", "recent/distant")
    table = [("layer", *names, "median")]
    rows = {str(layer): metrics.summaries(place) for place, layer in enumerate(metrics.layers)}
    rows["uniform"] = {name: {"mean": x, "median": x} for name, x in metrics.uniform_mean().items()}
    for label, found in rows.items():
        first = [_plus_minus(found[name]) for name in NAMES[:3]]
        evenness = f"{found['normalised_entropy']['mean']:.2f}"
        tokens = f"{found['effective_tokens']['mean']:.1f}"
        table.append((label, *first, evenness, tokens, *_ratio(found)))
    legend = "/ ln n: entropy over its maximum; tokens: read in effect; recent/distant: "
    legend += "last quarter over first"
    legend += "" if metrics.n_context.all() else "; without history all is 0"
    return "\n".join([title, *aligned(table), wrap(legend)])


def overall_block(metrics: Metrics) -> str:
    """The four metrics over all layers and samples; the ratio's median where it parts."""
    overall = metrics.summaries()
    ratio, median = _ratio(overall)
    lines = ["OVERALL ATTENTION STATISTICS", "=" * 36]
    labels = ("Mean context attention", "Attention concentration (std)", "Attention entropy")
    for label, name in zip(labels, NAMES[:3], strict=True):
        lines.append(f"{label}: {_plus_minus(overall[name])}")
    lines.append(f"Recent/Distant ratio: {ratio}" + (f" (median {median})" if median else ""))
    return "\n".join(lines)


def _plus_minus(summary: Mapping[str, float], told: Callable[[float], str] = FOUR) -> str:
    """Mean and std; a mean without any is aligned with the others."""
    spread = f" ± {told(summary.get('std', 0.0))}"
    return told(summary["mean"]) + (spread if "std" in summary else " " * len(spread))


def _ratio(summaries: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The recent/distant ratio, and its median where that tells another story, else ""."""
    ratio = summaries["recent_distant_ratio"]
    mean, median = ratio["mean"], ratio["median"]
    is_other = abs(mean - median) > PARTED * min(mean, median) and cap(mean) != cap(median)
    return _plus_minus(ratio, cap), cap(median) if is_other else ""


def insight_blocks(insights: Sequence[Insight], metrics: Metrics) -> str:
    """Insights with evidence, caveat and strategies: the whole model, then layers that differ."""
    blocks = []
    for told in insight_parts(insights, metrics):
        lines = [told["headline"], f"   {told['advice']}" if told["advice"] else None]
        for mark, text in told["lines"]:
            lines.append(wrap(text, f"   {mark} " if mark else "   ", "      "))
        blocks.append("\n".join(filter(None, lines)))
    return "\n\n".join(blocks)


def insight_parts(insights: Sequence[Insight], metrics: Metrics) -> list[dict[str, Any]]:
    """The same in parts: `headline`, `advice` and `lines`, each a mark and a text; some empty."""
    nothing = {
        "headline": "💡 INSIGHT: No single pattern over all layers together.",
        "advice": "Measure before compressing: neither place nor weight says what can go.",
        "lines": [],
    }
    parts = [_parts([insight]) for insight in insights if insight.layer is None] or [nothing]
    empty = {"headline": "", "advice": "", "lines": []}
    parts += [empty | {"lines": [("ℹ️ ", text)]} for text in remarks(metrics)]
    in_layers = [insight for insight in insights if insight.layer is not None]
    parts += [empty | {"headline": "WHERE LAYERS DIFFER FROM THE WHOLE"}] if in_layers else []
    groups = itertools.groupby(in_layers, key=lambda insight: insight.pattern)
    return parts + [_parts(list(same)) for _, same in groups]


def _parts(insights: Sequence[Insight]) -> dict[str, Any]:
    """One pattern: of the whole model, or of one or more layers, whose advice is the same."""
    first = insights[0]
    headline = first.headline
    if len(insights) > 1:
        layers = listed([i.layer for i in insights])
        headline = f"💡 INSIGHT: {PATTERNS[first.pattern].title} detected in {layers}!"
        if doubted := [i.layer for i in insights if i.by_rule_only]:
            where = "" if len(doubted) == len(insights) else f"in {listed(doubted)} "
            headline += f" ({where}by the absolute rule only)"
    lines = []
    for insight in insights:
        where = f"Layer {insight.layer}: " if len(insights) > 1 else ""
        evidence = None if insight.by_rule_only else insight.evidence  # the caveat has the figures
        said = {"📊": evidence, "⚠️ ": insight.caveat, "🧪": insight.effect}
        for mark, text in said.items():
            if text:
                lines.append((mark, f"{where}{text}"))
                where = ""
    if not all(insight.by_rule_only for insight in insights):
        lines.append(("", f"Strategies: {'; '.join(first.strategies)}. Example: {first.example}"))
    return {"headline": headline, "advice": first.advice, "lines": lines}


def metrics_json(
    metrics: Metrics,
    decisions: Sequence[Decision],
    insights: Sequence[Insight],
    meta: Mapping[str, Any],
    drawn: Mapping[int, Mapping[int, Any]],
    tokens: Mapping[int, Tokens],
) -> dict[str, Any]:
    """Everything that was measured, as plain numbers: the content of `metrics.json`.

    `meta` holds settings of the run, `drawn` layer -> sample -> the arrays in its pictures without
    whole maps, which would make the file unreadable, and `tokens` what their tokens are.
    """
    plain = {len(one) for one in tokens.values() if one.is_plain}
    return {
        "schema": "attention-metrics",
        "version": SCHEMA_VERSION,
        "meta": dict(meta),
        "definitions": DESCRIPTIONS,
        "samples": [_sample_json(i, one, tokens.get(i)) for i, one in enumerate(decisions)],
        "layers": [
            {
                "layer": scope.layer,
                "over_samples": metrics.summaries(place),
                "head_means": {name: metrics.of_heads(name, place).mean(0) for name in NAMES},
                "per_sample": {name: metrics.of(name)[place] for name in NAMES},
                "patterns": holding(scope),
            }
            for place, scope in enumerate(scopes(metrics)[1:])
        ],
        "overall": metrics.summaries(),
        "uniform": metrics.uniform_mean(),
        "insights": [asdict(insight) for insight in insights],
        "remarks": remarks(metrics),
        "drawn": {
            "note": "whole maps are not stored: their last row is query_rows, the rest is in "
            "the heatmaps alone",
            "uniform_received": {str(n): rounded(uniform_received(n)) for n in sorted(plain)},
            "layers": drawn,
        },
    }


def _sample_json(index: int, decision: Decision, tokens: Tokens | None) -> dict[str, Any]:
    """A sample; where it is in pictures, with its episodes, rewards, and tokens if not plain."""
    title = decision.title or f"sample {index}"
    entry = {"sample": index, "title": title, "n_context": decision.n, **decision.labels}
    if tokens is not None:
        rewarded = np.flatnonzero(decision.rewarded)
        entry |= {"episode_starts": decision.episode_starts, "rewarded": rewarded}
        if not tokens.is_plain:
            entry["tokens"] = asdict(tokens)
    return entry


def csv_rows(metrics: Metrics, decisions: Sequence[Decision]) -> Iterator[list]:
    """One row a sample, layer and head (a number or `mean`), below the names of the columns."""
    columns = dict.fromkeys(label for decision in decisions for label in decision.labels)
    yield ["sample", *columns, "layer", "head", "n_context", *NAMES]
    for index, decision in enumerate(decisions):
        labels = [decision.labels.get(key, "") for key in columns]
        for place, (layer, heads) in enumerate(zip(metrics.layers, metrics.heads, strict=True)):
            own = metrics.values[index, place, [*range(len(heads)), -1]].tolist()
            for head, values in zip((*heads, "mean"), own, strict=True):
                yield [index, *labels, layer, head, decision.n, *values]
