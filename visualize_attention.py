"""Show which history an AD model uses, and say how much of it can go.

    python visualize_attention.py                       # the latest checkpoint, ten decisions
    python visualize_attention.py --num-samples 30 --layers 2 3 --goal 0,5 --steps 1000:2999
    torchrun --nproc-per-node 4 visualize_attention.py --num-samples 5000 --num-figures 10

Captures the attention of every layer while the model decides, measures it, and says how the history
may be compressed. Writes pictures to `figs/attention/layer_N/` and `figs/attention/`, and every
number to `figs/attention/metrics.json` and `metrics.csv`.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis import Analysis
from attention import files, report
from attention.insights import Insight, find_patterns
from attention.metrics import AttentionMetrics
from checkpoint import pick_device
from collecting import Collected
from config import UserError, VisualizeConfig, add_flags, from_flags, run_command
from drawing import Painter, drawing_processes
from effects.dropping import Dropping, measure_dropping
from hdf5 import to_stderr
from loading import Loaded, load
from parallel import Group, join
from pictures import CURVES, clear_pictures, draw_batch, draw_summaries, n_pictures, prepare_output

MAX_FIGURES = 50  # samples drawn where --num-figures does not say


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, analyse, draw, report."""
    with join() as group:
        with group.told_once():
            flags = make_parser().parse_args(argv)
        with group.together():
            config = from_flags(VisualizeConfig, flags)
            job = prepare(config, group)
        if group.is_main:
            print(report.loaded_block(facts(job)), flush=True)
        collected = Collected(job.loaded.subject.n_samples, job.analysis.heads)
        measure(job, collected)
        with painting(job) as painter:
            drawn = draw_samples(job, collected, painter)
            metrics = collected.over(group, job.loaded.subject.sample)
            arrays = group.gather(drawn)
            if metrics is not None:
                draw_summaries(job.out, metrics, painter, config.dpi)
                insights = find_patterns(metrics)
                dropping = drop_history(job, insights)
                text = write_numbers(job, metrics, insights, dropping, merged(arrays))
        if metrics is not None:
            print(f"\n{text}\n\n{written(job, dropping)}")


@dataclass(frozen=True)
class Job:
    """What is analysed, how many samples are drawn, and where the files go."""

    config: VisualizeConfig
    loaded: Loaded
    analysis: Analysis
    n_drawn: int
    out: Path


def prepare(config: VisualizeConfig, group: Group) -> Job:
    """Load and check everything; no file of an earlier run is touched."""
    tell = to_stderr if group.is_main else lambda line: None
    loaded = load(config, group.device(pick_device(config.device)), tell)
    subject = loaded.subject
    layers = check_layers(config.layers, len(subject.layers))
    heads = check_heads(config.heads, [subject.n_heads[layer] for layer in layers])
    n_drawn = min(
        subject.n_samples, MAX_FIGURES if config.num_figures is None else config.num_figures
    )
    analysis = Analysis(subject, layers, config.precision, group, heads)
    return Job(config, loaded, analysis, n_drawn, prepare_output(Path(config.out), layers))


def make_parser() -> argparse.ArgumentParser:
    """The flags, one a setting of `VisualizeConfig`."""
    parser = argparse.ArgumentParser(
        description="Show which history an Algorithm Distillation model attends to, in pictures "
        "and numbers, and say how the history may be compressed.",
        epilog="Without flags: the latest checkpoint under checkpoints/, ten decisions from the "
        "learning histories of its test goals, pictures under figs/attention/.",
    )
    add_flags(parser, VisualizeConfig)
    return parser


def check_layers(wanted: list[int] | None, n_layers: int) -> list[int]:
    """The layers to analyse, ascending; all of them unless some are asked for."""
    unknown = [layer for layer in wanted or [] if not 0 <= layer < n_layers]
    if unknown:
        raise UserError(f"unknown layer {unknown[0]}: expected --layers in 0..{n_layers - 1}")
    return sorted(set(wanted)) if wanted else list(range(n_layers))


def check_heads(wanted: list[int] | None, n_heads: list[int]) -> tuple[int, ...] | None:
    """The heads to analyse, ascending; None, which is all of them, unless some are asked for."""
    unknown = [head for head in wanted or [] if not 0 <= head < min(n_heads)]
    if unknown:
        raise UserError(f"unknown head {unknown[0]}: expected --heads in 0..{min(n_heads) - 1}")
    return tuple(sorted(set(wanted))) if wanted else None


def measure(job: Job, collected: Collected) -> None:
    """Metrics of the samples that are not drawn."""
    total = job.analysis.n_measured(job.n_drawn)
    if not total:
        return
    with progress(job, "metrics", total, " samples") as bar:
        for batch in job.analysis.measured(job.n_drawn):
            collected.add(batch.metrics)
            bar.update(len(batch.samples))


@contextlib.contextmanager
def painting(job: Job) -> Iterator[Painter]:
    """Something to draw with, and a progress bar of rank 0's share of the pictures."""
    group = job.analysis.group
    total = n_pictures(len(group.share(job.n_drawn)), job.analysis.n_heads)
    n_processes = drawing_processes(total) if group.size == 1 else 1
    with (
        progress(job, "pictures", total, " pictures") as bar,
        Painter(n_processes, bar.update) as painter,
    ):
        yield painter


def draw_samples(job: Job, collected: Collected, painter: Painter) -> dict[int, dict[int, Any]]:
    """Metrics of the samples that are drawn, and their pictures; an earlier run's go first.

    Returns:
        The numbers in the pictures that this process drew: layer -> sample -> arrays.
    """
    group = job.analysis.group
    drawn: dict[int, dict[int, Any]] = {layer: {} for layer in job.analysis.layers}
    batches = job.analysis.drawn(job.n_drawn)
    first = next(batches, None)  # what fails has failed before a file is removed
    group.barrier()
    with group.together():
        if group.is_main:
            clear_pictures(job.out)
    for batch in itertools.chain([] if first is None else [first], batches):
        collected.add(batch.metrics)
        for layer, arrays in draw_batch(
            job.out, batch, painter, job.config.dpi, job.analysis.heads
        ).items():
            drawn[layer] |= arrays
    return drawn


def drop_history(job: Job, insights: Sequence[Insight]) -> Dropping:
    """Measure what dropping history does to the actions, and draw it; by rank 0 alone."""
    config = job.config
    off = not config.num_effects
    with tqdm(desc="effects", unit=" steps", file=sys.stderr, disable=off) as bar:
        found = measure_dropping(job.analysis, insights, config.num_effects, config.seed, bar)
    found.draw(job.out / CURVES, config.dpi)
    return found


def progress(job: Job, what: str, total: int, unit: str) -> tqdm:
    """A progress bar of rank 0's share."""
    group = job.analysis.group
    label = what if group.size == 1 else f"{what}, rank 0 of {group.size}"
    return tqdm(
        total=total, desc=label, unit=unit, file=sys.stderr, disable=not (total and group.is_main)
    )


def merged(parts: list[dict[int, dict[int, Any]]]) -> dict[int, dict[int, Any]]:
    """Arrays of drawn samples from all processes, in the order of samples."""
    return {
        layer: dict(sorted(item for part in parts for item in part[layer].items()))
        for layer in parts[0]
    }


def write_numbers(
    job: Job,
    metrics: AttentionMetrics,
    insights: Sequence[Insight],
    dropping: Dropping,
    drawn: dict[int, dict[int, Any]],
) -> str:
    """Write `metrics.json` and `metrics.csv`; gives what they say as console text."""
    insights = dropping.attached(insights)
    subject = job.loaded.subject
    meta = {**vars(job.config), **job.loaded.meta, "device": subject.device.type}
    meta |= {"n_layers": len(subject.layers)}
    content = files.metrics_json(metrics, insights, meta, drawn)
    content["effects"] = dropping.content
    files.write_json(job.out / "metrics.json", content)
    files.write_csv(job.out / "metrics.csv", metrics, job.loaded.label_columns)
    blocks = [report.layer_table(metrics), report.overall_block(metrics)]
    blocks += [report.pattern_table(metrics)] if len(metrics.layers) > 1 else []
    blocks += [report.insight_blocks(insights, metrics)]
    blocks += [dropping.text] if dropping.text else []
    return "\n\n".join(blocks)


def written(job: Job, dropping: Dropping) -> str:
    """What lies in the output folder, as console text."""
    total = n_pictures(job.n_drawn, job.analysis.n_heads) + dropping.is_drawn
    curves = f",\n{CURVES} shows the effect of dropping history" if dropping.is_drawn else ""
    return (
        f"{total} pictures in {job.out}/: layer_N/ has a heatmap and a line plot a sample and a "
        f"summary,\nattention_layers.png compares the layers{curves}.\nAll numbers: metrics.json "
        "and metrics.csv there."
    )


def facts(job: Job) -> dict[str, str]:
    """What was loaded, in words."""
    found, group = dict(job.loaded.facts), job.analysis.group
    if group.size > 1:
        found["Device"] += f", {group.size} processes"
    found["Samples"] += f"; {job.n_drawn} drawn"
    return found


if __name__ == "__main__":
    run_command(main)
