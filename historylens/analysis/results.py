"""What was found: the numbers of all samples, what they mean, and both as text and files.

results = find_out(job, metrics, play)
write_numbers(job, results, parts)                      # metrics.json, metrics.csv
print(*tables(results))
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from historylens import report
from historylens.analysis.job import Job, Pass
from historylens.analysis.learning import learning_text, over_learning
from historylens.analysis.play import Play
from historylens.common.files import staged
from historylens.effects import MeasuredEffects, measure_effects
from historylens.insights import Insight, find_patterns
from historylens.metrics import Metrics
from historylens.tokens import Tokens


@dataclass(frozen=True)
class Shown:
    """What a process found of the samples that it draws."""

    layers: dict[int, dict[int, Any]]  # layer -> sample -> the numbers in its pictures
    tokens: dict[int, Tokens] = field(default_factory=dict)  # sample -> what its tokens are
    maps: dict[int, Any] = field(default_factory=dict)  # sample -> the numbers of its map
    passes: list[Pass] = field(default_factory=list)  # as they fitted memory


@dataclass(frozen=True)
class Results:
    """What was measured over all samples, and what it means."""

    metrics: Metrics
    insights: Sequence[Insight]
    effects: MeasuredEffects
    learning: Mapping[str, Any] | None  # of own play


def find_out(job: Job, metrics: Metrics, play: Play | None) -> Results:
    """What the numbers mean, and what less history does to the actions."""
    agent, config = job.agent, job.config
    insights = find_patterns(metrics)
    wanted, is_off = (config.num_effects, config.seed), not config.num_effects
    with tqdm(desc="effects", unit=" steps", file=sys.stderr, disable=is_off) as bar:
        effects = measure_effects(agent, job.layers, job.heads, insights, *wanted, bar)
    learning = None if play is None else over_learning(play, job.layers, config.seed)
    return Results(metrics, effects.attached(insights), effects, learning)


def write_numbers(job: Job, results: Results, parts: Sequence[Shown]) -> None:
    """Write `metrics.json` and `metrics.csv`, given what each process has `Shown`.

    What an earlier run left stays whole until both are on the disk.
    """
    from historylens.pictures import clear_pictures

    agent, metrics = job.agent, results.metrics
    tokens = {index: one for part in parts for index, one in part.tokens.items()}
    maps = {index: one for part in parts for index, one in part.maps.items()}
    drawn = {
        layer: dict(sorted(item for part in parts for item in part.layers[layer].items()))
        for layer in job.layers
    }
    meta = {**vars(job.config), **agent.meta}
    meta |= {"device": agent.device.type, "n_layers": len(agent.layers)}
    shown = metrics, agent.decisions, results.insights, meta, drawn, tokens
    content = report.metrics_json(*shown) | {"effects": results.effects.json}
    if maps:
        content["drawn"]["maps"] = dict(sorted(maps.items()))
    if results.learning is not None:
        content["learning"] = results.learning
    rows = report.csv_lines(metrics, agent.decisions, agent.label_columns)
    with staged({job.out / "metrics.json": content, job.out / "metrics.csv": rows}):
        clear_pictures(job.out)


def tables(results: Results) -> list[str]:
    """Blocks of console text, but for the insights; these stand behind the first two."""
    learning = results.learning and learning_text(results.learning)
    blocks = [report.layer_table(results.metrics), report.overall_block(results.metrics), learning]
    return [*filter(None, [*blocks, *results.effects.text.split("\n\n")])]
