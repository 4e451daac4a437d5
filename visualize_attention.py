"""Show which history an AD model uses, and say how much of it can go.

    python visualize_attention.py                       # the latest checkpoint, ten decisions
    python visualize_attention.py --num-samples 30 --layers 2 3 --goal 0,5 --steps 1000:2999

Captures the attention of every layer while the model decides, measures it, and says how the history
may be compressed. Writes pictures to `figs/attention/layer_N/` and `figs/attention/`, and every
number to `figs/attention/metrics.json` and `metrics.csv`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from analysis import Batch, analyse
from attention import report
from attention.insights import find_patterns
from attention.metrics import GUIDE_METRICS, AttentionMetrics, concatenate, uniform_received
from checkpoint import (
    HISTORIES_NAME,
    Checkpoint,
    Choice,
    find_checkpoint,
    load_checkpoint,
    pick_device,
)
from config import UserError, VisualizeConfig, add_flags, from_flags, run_command
from dataset import Histories
from decisions import Decision, Filter, choose_decisions

MAX_FIGURES = 50  # samples drawn where --num-figures does not say


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, analyse, draw, report."""
    config = from_flags(VisualizeConfig, make_parser().parse_args(argv))
    device = pick_device(config.device)
    choice = find_checkpoint(config.checkpoint)
    checkpoint = load_checkpoint(choice.path, device)
    path = Path(config.histories or choice.path.parent / HISTORIES_NAME)
    histories = load_histories(path, checkpoint)
    layers = check_layers(config.layers, checkpoint)
    model = checkpoint.model
    decisions = choose_decisions(
        histories,
        model.n_context_max,
        config.num_samples,
        config.seed,
        config.stride,
        Filter(config.goal, config.history, config.steps),
    )
    n_drawn = min(len(decisions), MAX_FIGURES if config.num_figures is None else config.num_figures)
    out = prepare_output(Path(config.out))
    print(loaded(choice, checkpoint, path, histories, decisions, n_drawn, device), flush=True)

    metrics, drawn, pictures = draw_all(
        checkpoint, histories, decisions, layers, n_drawn, out, config.dpi
    )
    insights = find_patterns(metrics)
    meta = {
        "checkpoint": str(choice.path),
        "step": checkpoint.step,
        "histories": str(path),
        "n_transit": model.config.n_transit,
        "n_layers": model.config.tf_n_layer,
        "n_heads": model.config.tf_n_head,
        **{name: value for name, value in vars(config).items() if name != "checkpoint"},
    }
    report.write_json(out / "metrics.json", report.metrics_json(metrics, insights, meta, drawn))
    report.write_csv(out / "metrics.csv", metrics)
    blocks = [report.layer_table(metrics), report.overall_block(metrics)]
    blocks += [report.pattern_table(metrics)] if len(layers) > 1 else []
    blocks += [report.insight_blocks(insights, metrics)]
    print("\n" + "\n\n".join(blocks))
    print(
        f"\n{pictures} pictures in {out}/: layer_N/ has a heatmap and a line plot a sample and a "
        f"summary,\nattention_layers.png compares the layers. All numbers: {out}/metrics.json, "
        f"{out}/metrics.csv"
    )


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


def prepare_output(out: Path) -> Path:
    """Make the output folder and clear it of an earlier run's pictures, and of nothing else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write-test").touch()
        (out / ".write-test").unlink()
        for stale in [*out.glob("layer_*/attention_*.png"), *out.glob("attention_layers.png")]:
            stale.unlink()
        for folder in out.glob("layer_*"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {out} ({error.strerror}): choose another with --out"
        ) from error
    return out


def draw_all(
    checkpoint: Checkpoint,
    histories: Histories,
    decisions: list[Decision],
    layers: list[int],
    n_drawn: int,
    out: Path,
    dpi: int,
) -> tuple[AttentionMetrics, dict[int, dict[int, Any]], int]:
    """Analyse all decisions, draw those that are to be drawn, batch by batch.

    Returns:
        metrics of all decisions, the numbers in the pictures (layer -> sample -> arrays), and how
        many pictures were written.
    """
    from attention import figures  # matplotlib is slow to import: after the flags are checked

    parts: list[AttentionMetrics] = []
    drawn: dict[int, dict[int, Any]] = {layer: {} for layer in layers}
    n_pictures = (2 * n_drawn + 1) * len(layers) + 1
    with tqdm(total=n_pictures, desc="pictures", unit="picture", file=sys.stderr) as bar:
        for batch in analyse(checkpoint.model, histories, decisions, layers, n_drawn):
            parts.append(batch.metrics)
            if batch.has_maps:
                draw_samples(batch, out, dpi, drawn, bar)
        metrics = concatenate(parts)
        uniform = metrics.uniform_mean()
        for layer in metrics.layers:
            folder = out / f"layer_{layer.layer}"
            folder.mkdir(exist_ok=True)
            values = {name: layer.mean[name] for name in GUIDE_METRICS}
            path = folder / f"attention_summary_layer{layer.layer}.png"
            figures.summary(path, values, uniform, layer=layer.layer, dpi=dpi)
            bar.update()
        values = {name: metrics.pooled(name) for name in GUIDE_METRICS}
        figures.layers(out / "attention_layers.png", values, uniform, numbers=layers, dpi=dpi)
        bar.update()
    return metrics, drawn, n_pictures


def draw_samples(
    batch: Batch, out: Path, dpi: int, drawn: dict[int, dict[int, Any]], bar: tqdm
) -> None:
    """A heatmap and a line plot for each sample and layer of a batch."""
    from attention import figures

    for number, layer in batch.attention.items():
        folder = out / f"layer_{number}"
        folder.mkdir(exist_ok=True)
        for i, sample in enumerate(batch.samples):
            name = f"sample{sample.index}_layer{number}.png"
            rows, received = layer.query_rows[i].numpy(), layer.received[i].numpy()
            figures.heatmap(
                folder / f"attention_heatmap_{name}",
                layer.maps[i].numpy(),
                layer.map_rows.numpy(),
                layer.map_cols.numpy(),
                sample,
                layer=number,
                dpi=dpi,
            )
            even = uniform_received(sample.n_context + 1)
            path = folder / f"attention_lines_{name}"
            figures.lines(path, rows, received, even, sample, layer=number, dpi=dpi)
            drawn[number][sample.index] = report.drawn_arrays(rows, received)
            bar.update(2)


def loaded(
    choice: Choice,
    checkpoint: Checkpoint,
    path: Path,
    histories: Histories,
    decisions: list[Decision],
    n_drawn: int,
    device: torch.device,
) -> str:
    """What was loaded, as console text."""
    model = checkpoint.model.config
    goals = {tuple(histories.goals[d.history].tolist()) for d in decisions}
    used = {d.history for d in decisions}
    steps = [d.step for d in decisions]
    return report.loaded_block(
        {
            "Checkpoint": f"{choice.path} ({choice.reason})",
            "Step": f"{checkpoint.step:,} gradient updates",
            "Model": f"{model.tf_n_layer} layers x {model.tf_n_head} heads, width "
            f"{model.tf_n_embd}, {sum(p.numel() for p in checkpoint.model.parameters()):,} "
            "parameters",
            "Context length": f"{model.n_transit - 1} transitions, then the query token "
            f"({model.n_transit} tokens)",
            "Device": str(device),
            "Histories": f"{path} ({histories.n_histories} histories of {histories.n_steps:,} "
            f"steps, {len(set(map(tuple, histories.goals.tolist())))} goals)",
            "Samples": f"{len(decisions)} decisions of {len(goals)} goals and {len(used)} "
            f"histories, steps {min(steps):,} to {max(steps):,}; {n_drawn} drawn",
        }
    )


if __name__ == "__main__":
    run_command(main)
