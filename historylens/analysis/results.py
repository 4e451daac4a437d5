"""The work of a job: it measures, says what that means, writes the numbers, and draws.

analyse(job, agent.facts)      # metrics.json, metrics.csv; then pictures and index.html
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from historylens import pictures, report
from historylens.analysis.job import Job, Pass, batches, drawn_passes
from historylens.analysis.learning import learning_text, over_learning
from historylens.analysis.play import Play, record
from historylens.analysis.room import room_maps
from historylens.common.batches import MAX_TOKENS, alike, even_parts
from historylens.common.files import csv_lines, staged
from historylens.common.text import wrap
from historylens.effects import MeasuredEffects, measure_effects
from historylens.insights import Insight, find_patterns
from historylens.metrics import Metrics
from historylens.pictures.browse import figures_of, write_page
from historylens.pictures.names import pictures_in
from historylens.pictures.painter import Painter, drawing_processes

# What the pictures of samples show: layer, "maps" or "tokens" -> sample -> numbers.
Shown = dict[int | str, dict[int, Any]]
EACH = {  # kinds of pictures of which there are many
    "heatmap": "a heatmap and a line plot a sample",
    "summary": "a summary a layer",
    "map": "a map a sample",
    "step heatmap": "a rollout step by step",
}


@dataclass(frozen=True)
class Results:
    """What was measured over all samples, and what it means."""

    metrics: Metrics
    insights: Sequence[Insight]
    effects: MeasuredEffects
    learning: Mapping[str, Any] | None  # of own play


def analyse(job: Job, facts: Mapping[str, str]) -> None:
    """Play if asked, measure, write the numbers, then draw; rank 0 prints and writes."""
    agent, config, group, play, results = job.agent, job.config, job.group, None, None
    if config.plays:
        play = record(job)
        agent.look_at(play.choose(config.num_samples, config.seed))
    metrics = Metrics(len(agent.decisions), job.layers, job.heads)
    measure(job, metrics)
    shown, passes = measure_drawn(job, metrics)
    metrics, parts = metrics.gather(group), group.gather(shown)
    if metrics is not None:
        results = find_out(job, metrics, play)
        write_numbers(job, results, parts)
        first, second, *others = tables(results)
        told = report.insight_blocks(results.insights, results.metrics)
        print("", "\n\n".join([first, second, told, *others]), sep="\n", flush=True)
    group.barrier()  # from here on pictures are drawn, and may fail
    n_drawn = group.gather(draw(job, passes, results, play))
    if n_drawn is not None:
        print("", wrap(finish(job, results, facts, sum(n_drawn))), sep="\n")


def measure(job: Job, metrics: Metrics) -> None:
    """Metrics of the samples that are not drawn: a fair share of the passes over them."""
    agent = job.agent
    size = max(1, MAX_TOKENS // agent.n_tokens)
    rest = alike(range(job.n_drawn, len(agent.decisions)), agent.length)
    passes = [same[p.start : p.stop] for same in rest for p in even_parts(0, len(same), size)]
    for batch in batches(job, [(passes[i], ()) for i in job.group.share(len(passes))], "metrics"):
        metrics.put(batch.indices, batch.rows, batch.even, batch.history)


def measure_drawn(job: Job, metrics: Metrics) -> tuple[Shown, list[Pass]]:
    """Metrics of the samples that this process draws, what pictures show, and passes that fit."""
    shown: Shown = {kind: {} for kind in (*job.layers, "maps", "tokens")}
    passes = []
    for batch in batches(job, drawn_passes(job, job.n_drawn), "attention"):
        metrics.put(batch.indices, batch.rows, batch.even, batch.history)
        for layer, index, sample in pictures.samples(batch):
            shown[layer][index] = sample.numbers()
            shown["tokens"][index] = sample.tokens
        for index, room, names in room_maps(job, batch):
            shown["maps"][index] = {"panels": names} | room.numbers()
        passes.append((batch.indices, batch.drawn))
    return shown, passes


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
    """Write `metrics.json` and `metrics.csv`; until both are there an earlier run stays whole."""
    agent, metrics, decisions = job.agent, results.metrics, [*job.agent.decisions]
    drawn = {k: dict(sorted(x for part in parts for x in part[k].items())) for k in parts[0]}
    tokens, maps = drawn.pop("tokens"), drawn.pop("maps")
    meta = {**vars(job.config), **agent.meta}
    meta |= {"device": agent.device.type, "n_layers": len(agent.layers)}
    content = report.metrics_json(metrics, decisions, results.insights, meta, drawn, tokens)
    content["effects"] = results.effects.json
    if maps:
        content["drawn"]["maps"] = maps
    if results.learning is not None:
        content["learning"] = results.learning
    lines = csv_lines(report.csv_rows(metrics, decisions))
    with staged({job.out / "metrics.json": content, job.out / "metrics.csv": lines}):
        pictures.clear_pictures(job.out)


def tables(results: Results) -> list[str]:
    """Blocks of console text, but for the insights; these stand behind the first two."""
    learning = results.learning and learning_text(results.learning)
    blocks = [report.layer_table(results.metrics), report.overall_block(results.metrics), learning]
    return [*filter(None, [*blocks, *results.effects.text.split("\n\n")])]


def draw(job: Job, passes: Sequence[Pass], results: Results | None, play: Play | None) -> int:
    """Draw this process's share, and with the results what compares samples; gives how many.

    The passes are run once more: their maps, all at once, would not fit memory.
    """
    agent, config, group = job.agent, job.config, job.group
    style = {"formats": tuple(dict.fromkeys(config.format or ["png"])), "dpi": config.dpi}
    once = {} if results is None else pictures.alone(results.effects, results.learning, agent.title)
    share, n_heads = len(group.share(job.n_drawn)), [*map(len, job.heads)]
    n_own = pictures.n_pictures(share, n_heads) + len(once) + len(job.layers) + 1  # of rank 0
    n_own += 0 if agent.room is None else share
    if config.trajectory is not None:  # is followed: its steps are the decisions of another job
        steps = replace(job, agent=copy.copy(agent), out=job.followed)
        numbers = range(0, play.rewards.shape[1], config.every)
        steps.agent.decisions = [play.decision(config.trajectory, step) for step in numbers]
        n_own += pictures.n_pictures(len(group.share(len(numbers))), n_heads) + 1
    n_own *= len(style["formats"])
    n_processes = drawing_processes(n_own) if group.size == 1 else 1
    kept = f"all numbers are in {job.out / 'metrics.json'}"
    progress = job.progress("pictures", n_own, " pictures")
    with progress as bar, Painter(n_processes, kept, bar.update, **style) as painter:
        for batch in batches(job, passes):
            pictures.draw_batch(job.out, batch, painter, room_maps(job, batch))
        if results is not None:
            pictures.draw_summaries(job.out, results.metrics, painter)
        for name, (function, own) in once.items():
            painter.draw(function, job.out / name, **own)
        if config.trajectory is not None:
            if results is not None:
                pictures.draw_play(steps.out, play, config.trajectory, job.layers, painter)
            for batch in batches(steps, drawn_passes(steps, len(numbers))):
                pictures.draw_batch(steps.out, batch, painter, name="timestep", every=config.every)
    return painter.n_drawn


def finish(job: Job, results: Results, facts: Mapping[str, str], n_drawn: int) -> str:
    """Write the page on which all can be browsed, and say what there is."""
    insights = report.insight_parts(results.insights, results.metrics)
    texts = [block.partition("\n")[::2] for block in tables(results)]
    figures = figures_of(job.out, job.agent.decisions, results.metrics)
    title, is_single = f"Attention of {job.agent.title}", job.config.single_file
    page = write_page(job.out, title, facts, insights, texts, figures, is_single)
    (job.out / pictures.INCOMPLETE).unlink()  # fails where the folder is gone
    found = pictures_in(job.out)
    kinds = [text for kind, text in EACH.items() if any(one.kind == kind for one in found)]
    kinds += [one.path.name for one in found if one.sample is None and one.path.parent == job.out]
    drawn = f"{n_drawn} pictures in {job.out}/: {', '.join(kinds)}"
    drawn = drawn if n_drawn else f"No picture could be drawn in {job.out}/"
    return f"{drawn}. All of it on one page: {page}. All numbers: metrics.json, metrics.csv."
