"""Numbers -> console text.

Blocks are returned as strings of at most 100 columns; printing is the command's affair.

    print(layer_table(result)); print(overall_block(result)); print(insight_blocks(insights))
"""

import textwrap
from collections.abc import Mapping, Sequence

from attention.advice import PATTERNS
from attention.console import WIDTH, aligned, columns, wrap
from attention.evidence import (
    FOCUSED_ENTROPY,
    RECENCY_RATIO,
    SPARSE_MAJORITY,
    UNIFORM_ENTROPY,
    cap,
    layer_list,
)
from attention.insights import Insight, remarks, scopes, verdicts
from attention.metrics import (
    SUMMARY_METRICS,
    AttentionMetrics,
    Summary,
)

PARTED = 0.1  # mean and median differ by more than this share: the median is shown as well


def loaded_block(lines: Mapping[str, str]) -> str:
    """`label: text` lines with the texts aligned; long texts wrap below themselves."""
    width = max(columns(label) for label in lines) + 2
    return "\n".join(
        wrap(text, f"{label}:" + " " * (width - columns(label) - 1), " " * width)
        for label, text in lines.items()
    )


def layer_table(metrics: AttentionMetrics) -> str:
    """The metrics of every layer: mean ± std over samples, uniform attention in the last row."""
    n = scopes(metrics)[0].length
    title = f"METRICS PER LAYER (mean ± std over samples; {n} context tokens, "
    title += f"{len(metrics.samples)} sample{'' if len(metrics.samples) == 1 else 's'})"
    names = ("mean attention", "concentration", "entropy", "/ ln n", "tokens", "recent/distant")
    table = [("layer", *names, "median")]
    table += [(str(layer.layer), *_table_cells(layer.summary())) for layer in metrics.layers]
    even = metrics.uniform_mean()
    table.append(
        (
            "uniform",
            *(f"{even[name]:.4f}".ljust(len("0.0000 ± 0.0000")) for name in SUMMARY_METRICS[:3]),
            f"{even['normalised_entropy']:.2f}",
            f"{even['effective_tokens']:.1f}",
            f"{even['recent_distant_ratio']:.2f}".ljust(len("0.00 ± 0.00")),
            "",
        )
    )
    legend = (
        "entropy in nats; / ln n: entropy of the context part over its maximum; tokens: read in "
        "effect, exp(entropy); recent/distant: last quarter of the context over the first, and the "
        "median where it differs; uniform: what reading every token equally would show"
    )
    return "\n".join([title, *aligned(table), *textwrap.wrap(legend, WIDTH)])


def _table_cells(summary: Mapping[str, Summary]) -> tuple[str, ...]:
    return (
        *(_plus_minus(summary[name], 4) for name in SUMMARY_METRICS[:3]),
        f"{summary['normalised_entropy'].mean:.2f}",
        f"{summary['effective_tokens'].mean:.1f}",
        *_ratio(summary),
    )


def overall_block(metrics: AttentionMetrics) -> str:
    """The four metrics over all layers and samples, mean ± std.

    The median stands beside the ratio where it parts from the mean.
    """
    overall = metrics.overall()
    ratio, median = _ratio(overall)
    return "\n".join(
        [
            "OVERALL ATTENTION STATISTICS",
            "=" * 36,
            f"Mean context attention: {_plus_minus(overall['mean_context_attention'], 4)}",
            f"Attention concentration (std): {_plus_minus(overall['concentration'], 4)}",
            f"Attention entropy: {_plus_minus(overall['entropy'], 4)}",
            f"Recent/Distant ratio: {ratio}" + (f" (median {median})" if median else ""),
        ]
    )


def pattern_table(metrics: AttentionMetrics) -> str:
    """Which pattern holds in which layer, each with the figure that its rule looks at."""
    table = [
        ("", *PATTERNS),
        ("figure", "median ratio", "mean entropy", "mean entropy", "sparse rows"),
        (
            "rule",
            f"> {RECENCY_RATIO}",
            f"> {UNIFORM_ENTROPY}",
            f"< {FOCUSED_ENTROPY}",
            f"> {SPARSE_MAJORITY:.0%}",
        ),
    ]
    overall, *per_layer = scopes(metrics)
    for scope in [*per_layer, overall] if len(per_layer) > 1 else per_layer:
        cells = [
            f"{'yes' if holds else 'no':>3} {f'{x:.0%}' if name == 'sparse' else cap(x):>7}"
            for name, (x, holds) in verdicts(scope).items()
        ]
        table.append(("all" if scope.layer is None else f"layer {scope.layer}", *cells))
    return "\n".join(["PATTERNS PER LAYER", *aligned(table)])


def insight_blocks(insights: Sequence[Insight], metrics: AttentionMetrics) -> str:
    """Insights with evidence, caveat and strategies: the whole model, then layers that differ."""
    whole = [insight for insight in insights if insight.layer is None]
    blocks = [_insight_block([insight]) for insight in whole]
    if not whole:
        blocks.append(
            "💡 INSIGHT: No single pattern over all layers together.\n"
            "   Measure before compressing: neither place nor weight says what can go."
        )
    blocks += [wrap(text, "   ℹ️  ", "      ") for text in remarks(metrics)]
    in_layers = [insight for insight in insights if insight.layer is not None]
    if in_layers:
        blocks.append("WHERE LAYERS DIFFER FROM THE WHOLE")
    for name in PATTERNS:
        same = [insight for insight in in_layers if insight.pattern == name]
        if same:
            blocks.append(_insight_block(same))
    return "\n\n".join(blocks)


def _insight_block(insights: Sequence[Insight]) -> str:
    """One pattern: of the whole model, or of one or more layers, whose advice is the same."""
    first = insights[0]
    headline = first.headline
    if len(insights) > 1:
        layers = layer_list([i.layer for i in insights])
        headline = f"💡 INSIGHT: {PATTERNS[first.pattern].title} detected in {layers}!"
        doubted = [i.layer for i in insights if i.by_rule_only]
        if doubted:
            where = "" if len(doubted) == len(insights) else f"in {layer_list(doubted)} "
            headline += f" ({where}by the absolute rule only)"
    lines = [headline, f"   {first.advice}", wrap(first.meaning, "   ")]
    for insight in insights:
        where = f"Layer {insight.layer}: " if len(insights) > 1 else ""
        lines.append(wrap(f"{where}{insight.evidence}", "   📊 ", "      "))
        if insight.caveat:
            lines.append(wrap(insight.caveat, "   ⚠️  ", "      "))
        if insight.effect:
            lines.append(wrap(insight.effect, "   🧪 ", "      "))
    lines.append("   Strategies:")
    lines += [wrap(strategy, "   - ", "     ") for strategy in first.strategies]
    lines.append(wrap(f"Example: {first.example}", "   - ", "     "))
    return "\n".join(lines)


def _plus_minus(summary: Summary, decimals: int) -> str:
    return f"{_fixed(summary.mean, decimals)} ± {_fixed(summary.std, decimals)}"


def _fixed(value: float, decimals: int) -> str:
    """Fixed decimals without a negative zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _ratio(summary: Mapping[str, Summary]) -> tuple[str, str]:
    """The recent/distant ratio, and its median where that tells another story, else ""."""
    ratio = summary["recent_distant_ratio"]
    parted = abs(ratio.mean - ratio.median) > PARTED * min(ratio.mean, ratio.median)
    parted = parted and cap(ratio.mean) != cap(ratio.median)
    return f"{cap(ratio.mean)} ± {cap(ratio.std)}", cap(ratio.median) if parted else ""
