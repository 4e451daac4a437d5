"""Show which history an AD model uses, and say how much of it can go.

    python visualize_attention.py                       # the latest checkpoint, ten decisions
    python visualize_attention.py --num-samples 30 --layers 2 3 --goal 0,5 --steps 1000:2999
    torchrun --nproc-per-node 4 visualize_attention.py --num-samples 5000 --num-figures 10

Captures the attention of every layer while the model decides, measures it, and says how the history
may be compressed. Writes pictures to `figs/attention/layer_N/` and `figs/attention/`, and every
number to `figs/attention/metrics.json` and `metrics.csv`.
"""

import argparse
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis import Analysis, Batch
from attention import report
from attention.insights import find_patterns
from attention.metrics import SUMMARY_METRICS, AttentionMetrics, uniform_received
from checkpoint import (
    HISTORIES_NAME,
    Checkpoint,
    Choice,
    find_checkpoint,
    load_checkpoint,
    pick_device,
)
from collecting import Collected
from config import UserError, VisualizeConfig, add_flags, from_flags, run_command
from dataset import Histories
from decisions import Filter, choose_decisions
from parallel import Group, join

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
            print(loaded(job), flush=True)
        collected = Collected(len(job.analysis.decisions))
        measure(job, collected)
        drawn = draw_samples(job, collected)
        metrics = collected.over(group, job.analysis.sample)
        arrays = group.gather(drawn)
        if metrics is not None:
            n_pictures = draw_summaries(job, metrics)
            finish(job, config, metrics, merged(arrays), n_pictures)


@dataclass(frozen=True)
class Job:
    """What is analysed, how many samples are drawn, and where the files go."""

    choice: Choice
    checkpoint: Checkpoint
    path: Path  # of the histories
    analysis: Analysis
    n_drawn: int
    out: Path
    dpi: int


def prepare(config: VisualizeConfig, group: Group) -> Job:
    """Load and check everything; no file of an earlier run is touched."""
    device = group.device(pick_device(config.device))
    choice = find_checkpoint(config.checkpoint)
    checkpoint = load_checkpoint(choice.path, device)
    path = Path(config.histories or choice.path.parent / HISTORIES_NAME)
    histories = load_histories(path, checkpoint)
    layers = check_layers(config.layers, checkpoint)
    decisions = choose_decisions(
        histories,
        checkpoint.model.n_context_max,
        config.num_samples,
        config.seed,
        config.stride,
        Filter(config.goal, config.history, config.steps),
    )
    n_drawn = min(len(decisions), MAX_FIGURES if config.num_figures is None else config.num_figures)
    analysis = Analysis(checkpoint.model, histories, decisions, layers, config.precision, group)
    out = prepare_output(Path(config.out), layers)
    return Job(choice, checkpoint, path, analysis, n_drawn, out, config.dpi)


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


def load_histories(path: Path, checkpoint: Checkpoint) -> Histories:
    """Read learning histories that the checkpoint's model can read."""
    if not path.is_file():
        raise UserError(
            f"no learning histories: expected {path} beside the checkpoint; name a file with "
            "--histories, or train with `python train.py`, which writes it"
        )
    histories = Histories.load(path)
    if not histories.n_histories:
        raise UserError(f"{path} does not fit: expected learning histories, it holds none")
    largest = max(int(histories.states.max()), int(histories.next_states.max()))
    if largest >= checkpoint.model.config.grid_size:
        raise UserError(
            f"{path} does not fit the checkpoint: expected rows and columns below "
            f"{checkpoint.model.config.grid_size}, got {largest}"
        )
    return histories


def check_layers(wanted: list[int] | None, checkpoint: Checkpoint) -> list[int]:
    """The layers to analyse, ascending; all of them unless some are asked for."""
    n_layers = checkpoint.model.config.tf_n_layer
    unknown = [layer for layer in wanted or [] if not 0 <= layer < n_layers]
    if unknown:
        raise UserError(f"unknown layer {unknown[0]}: expected --layers in 0..{n_layers - 1}")
    return sorted(set(wanted)) if wanted else list(range(n_layers))


def prepare_output(out: Path, layers: list[int]) -> Path:
    """Make the output folder and check that files can be written where they will lie."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
        folders = [out / f"layer_{layer}" for layer in layers]
        files = [out / "metrics.json", out / "metrics.csv", *stale_pictures(out)]
        for path in [*folders, *files]:
            if path.exists() and path.is_dir() != (path in folders):
                raise UserError(
                    f"cannot write to the output folder {out}: {path} is in the way; move it or "
                    "choose another folder with --out"
                )
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {out} ({error.strerror}): choose another with --out"
        ) from error
    return out


def stale_pictures(out: Path) -> list[Path]:
    """Pictures of an earlier run in an output folder."""
    return [*out.glob("layer_*/attention_*.png"), *out.glob("attention_layers.png")]


def clear_pictures(out: Path) -> None:
    """Remove the pictures of an earlier run, and nothing else."""
    for stale in stale_pictures(out):
        stale.unlink()
    for folder in out.glob("layer_*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def measure(job: Job, collected: Collected) -> None:
    """Metrics of the samples that are not drawn."""
    total = job.analysis.n_measured(job.n_drawn)
    if not total:
        return
    with progress(job, "metrics", total, " samples") as bar:
        for batch in job.analysis.measured(job.n_drawn):
            collected.add(batch.metrics)
            bar.update(len(batch.samples))


def draw_samples(job: Job, collected: Collected) -> dict[int, dict[int, Any]]:
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
    total = 2 * len(job.analysis.layers) * len(group.share(job.n_drawn))
    with progress(job, "pictures", total, " pictures") as bar:
        for batch in itertools.chain([] if first is None else [first], batches):
            collected.add(batch.metrics)
            draw_batch(job, batch, drawn, bar)
    return drawn


def progress(job: Job, what: str, total: int, unit: str) -> tqdm:
    """A progress bar of rank 0's share."""
    group = job.analysis.group
    label = what if group.size == 1 else f"{what}, rank 0 of {group.size}"
    return tqdm(
        total=total, desc=label, unit=unit, file=sys.stderr, disable=not (total and group.is_main)
    )


def draw_batch(job: Job, batch: Batch, drawn: dict[int, dict[int, Any]], bar: tqdm) -> None:
    """A heatmap and a line plot for each layer and each sample that comes with a map."""
    from attention import figures  # matplotlib is slow to import: after the flags are checked

    for number, layer in batch.attention.items():
        folder = job.out / f"layer_{number}"
        folder.mkdir(exist_ok=True)
        for image, i in zip(layer.maps, batch.drawn, strict=True):
            sample = batch.samples[i]
            name = f"sample{sample.index}_layer{number}.png"
            rows, received = layer.query_rows[i].numpy(), layer.received[i].numpy()
            figures.heatmap(
                folder / f"attention_heatmap_{name}",
                image.numpy(),
                layer.map_rows.numpy(),
                layer.map_cols.numpy(),
                sample,
                layer=number,
                dpi=job.dpi,
            )
            even = uniform_received(sample.n_context + 1)
            path = folder / f"attention_lines_{name}"
            figures.lines(path, rows, received, even, sample, layer=number, dpi=job.dpi)
            drawn[number][sample.index] = report.drawn_arrays(rows, received)
            bar.update(2)


def draw_summaries(job: Job, metrics: AttentionMetrics) -> int:
    """A summary a layer and the comparison across layers; gives the number of all pictures."""
    from attention import figures

    uniform = metrics.uniform_mean()
    for layer in metrics.layers:
        folder = job.out / f"layer_{layer.layer}"
        folder.mkdir(exist_ok=True)
        values = {name: layer.mean[name] for name in SUMMARY_METRICS}
        path = folder / f"attention_summary_layer{layer.layer}.png"
        figures.summary(path, values, uniform, layer=layer.layer, dpi=job.dpi)
    values = {name: metrics.pooled(name) for name in SUMMARY_METRICS}
    numbers = job.analysis.layers
    figures.layers(job.out / "attention_layers.png", values, uniform, numbers=numbers, dpi=job.dpi)
    return (2 * job.n_drawn + 1) * len(numbers) + 1


def merged(parts: list[dict[int, dict[int, Any]]]) -> dict[int, dict[int, Any]]:
    """Arrays of drawn samples from all processes, in the order of samples."""
    return {
        layer: dict(sorted(item for part in parts for item in part[layer].items()))
        for layer in parts[0]
    }


def finish(
    job: Job,
    config: VisualizeConfig,
    metrics: AttentionMetrics,
    drawn: dict[int, dict[int, Any]],
    n_pictures: int,
) -> None:
    """Write the numbers, print what they say."""
    model, out = job.checkpoint.model.config, job.out
    insights = find_patterns(metrics)
    meta = vars(config) | {
        "checkpoint": str(job.choice.path),
        "step": job.checkpoint.step,
        "histories": str(job.path),
        "device": job.checkpoint.model.pred_action.weight.device.type,
        "n_transit": model.n_transit,
        "n_layers": model.tf_n_layer,
        "n_heads": model.tf_n_head,
    }
    report.write_json(out / "metrics.json", report.metrics_json(metrics, insights, meta, drawn))
    report.write_csv(out / "metrics.csv", metrics)
    blocks = [report.layer_table(metrics), report.overall_block(metrics)]
    blocks += [report.pattern_table(metrics)] if len(metrics.layers) > 1 else []
    blocks += [report.insight_blocks(insights, metrics)]
    print("\n" + "\n\n".join(blocks))
    print(
        f"\n{n_pictures} pictures in {out}/: layer_N/ has a heatmap and a line plot a sample and a "
        f"summary,\nattention_layers.png compares the layers. All numbers: metrics.json and "
        "metrics.csv there."
    )


def loaded(job: Job) -> str:
    """What was loaded, as console text."""
    checkpoint, histories = job.checkpoint, job.analysis.histories
    model, decisions, group = checkpoint.model.config, job.analysis.decisions, job.analysis.group
    goals = {tuple(histories.goals[d.history].tolist()) for d in decisions}
    used = {d.history for d in decisions}
    steps = [d.step for d in decisions]
    shared = "" if group.size == 1 else f", {group.size} processes"
    return report.loaded_block(
        {
            "Checkpoint": f"{job.choice.path} ({job.choice.reason})",
            "Step": f"{checkpoint.step:,} gradient updates",
            "Model": f"{model.tf_n_layer} layers x {model.tf_n_head} heads, width "
            f"{model.tf_n_embd}, {sum(p.numel() for p in checkpoint.model.parameters()):,} "
            "parameters",
            "Context length": f"{model.n_transit - 1} transitions, then the query token "
            f"({model.n_transit} tokens)",
            "Device": f"{checkpoint.model.pred_action.weight.device}{shared}",
            "Histories": f"{job.path} ({histories.n_histories} histories of {histories.n_steps:,} "
            f"steps, {len(set(map(tuple, histories.goals.tolist())))} goals)",
            "Samples": f"{len(decisions)} decisions of {len(goals)} goals and {len(used)} "
            f"histories, steps {min(steps):,} to {max(steps):,}; {job.n_drawn} drawn",
        }
    )


if __name__ == "__main__":
    run_command(main)
