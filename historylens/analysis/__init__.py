"""The main job: which history an agent attends to, and what happens to its actions without it.

    historylens --adapter my_model.py                        # also: python visualize_attention.py
    historylens compare --adapter my_model.py                # `historylens.comparison`

From an agent and its decisions through one forward pass with capture to rows of attention, metrics,
insights, effects and files: `metrics.json` and `metrics.csv` in the output folder. Then, whatever
becomes of them, pictures: `layer_N/*.png`, `attention_layers.png`, `deletion_curves.png`,
`head_effects.png`.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from historylens import report
from historylens.agent import Agent, pick_device
from historylens.analysis.job import Job, batches
from historylens.common.batches import MAX_DRAWN, MAX_DRAWN_TOKENS, MAX_TOKENS, alike, even_parts
from historylens.common.errors import expect, note, run_command
from historylens.common.files import write_json
from historylens.common.processes import join
from historylens.common.settings import Settings, add_flags, from_flags, setting
from historylens.common.text import labelled, wrap
from historylens.effects import MeasuredEffects, measure_effects
from historylens.insights import Insight, find_patterns
from historylens.metrics import Metrics
from historylens.tokens import Tokens


@dataclass(frozen=True)
class AnalysisConfig(Settings):
    """What to analyse, and where the pictures go."""

    adapter: str | None = setting(
        None, "Python file that says how to run a model of your own, see examples/", "FILE"
    )
    num_samples: int = setting(64, "decisions to analyse", at_least=1)
    num_figures: int = setting(10, "decisions to draw, the first of them", at_least=0)
    num_effects: int = setting(
        64, "decisions on which the effect of dropping history is measured; 0: none", at_least=0
    )
    layers: list[int] | None = setting(None, "layers to analyse, from 0 (default: all)")
    heads: list[int] | None = setting(
        None, "heads to analyse and to average over, from 0 (default: all)"
    )
    rewarded_above: float | None = setting(
        None, "rewards above it count as rewarded (default: 0, or the top quarter of those in an "
        "adapter's samples where these are of more than two values)",
    )  # fmt: skip
    out: str = setting("figs/attention", "folder for pictures and numbers", "DIR")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "NAME")
    precision: str = setting(
        "float32", "of the model's forward pass; metrics are float64 whatever it is",
        choices=("float32", "bfloat16"),
    )  # fmt: skip
    seed: int = setting(0, "seed of the choice of decisions", at_least=0)
    dpi: int = setting(100, "pixels an inch of the pictures", at_least=1)


CHECKPOINT_FLAGS = ("checkpoint", "histories", "goal", "history", "steps", "stride")
Pass = tuple[Sequence[int], Sequence[int]]  # numbers of decisions, places of those drawn
Load = Callable[[Any, torch.device, Callable[[str], None]], Agent]


@dataclass(frozen=True)
class Shown:
    """What a process found of the samples that it draws."""

    layers: dict[int, dict[int, Any]]  # layer -> sample -> the numbers in its pictures
    tokens: dict[int, Tokens] = field(default_factory=dict)  # sample -> what its tokens are
    passes: list[Pass] = field(default_factory=list)  # as they fitted memory


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and analyse the model of an adapter; `compare` is a command of its own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        from historylens.comparison import main as compare

        return compare(argv[1:], prog="historylens compare")
    parser = argparse.ArgumentParser(
        description="Show which history an in-context reinforcement learner attends to, in "
        "pictures and numbers, and say how the history may be compressed.",
        epilog="`historylens compare` runs the model on compressed history in its environment.",
    )
    add_flags(parser, AnalysisConfig)
    hidden = parser.add_argument_group("flags of checkpoints, refused here")
    for name in CHECKPOINT_FLAGS:
        hidden.add_argument(f"--{name}", nargs="+", help=argparse.SUPPRESS)
    run(argv, parser, AnalysisConfig, load_adapter)


def load_adapter(config: Any, device: torch.device, tell: Callable[[str], None]) -> Agent:
    """The model and the decisions of an adapter; UserError where it does not fit."""
    from historylens.adapter.agent import load

    what = "expected --adapter FILE, a Python file that says how to run your model"
    expect(config.adapter is not None, what)
    wanted = config.num_samples, config.seed, device, config.rewarded_above
    return load(config.adapter, *wanted, tell)


def run(argv: Sequence[str], parser: argparse.ArgumentParser, kind: type, load: Load) -> None:
    """Parse the flags, load the agent, analyse it, with all processes that torchrun started.

    `parser` has a flag for every setting of `kind`, `AnalysisConfig` or a class of more settings;
    `load` gives the agent from settings, device, and a function that tells the user something.
    """
    with join() as group:
        with group.told_once():
            flags = parser.parse_args(argv)
        with group.together():
            for name in CHECKPOINT_FLAGS:
                what = f"--{name} has no meaning beside --adapter: its load() chooses the model "
                is_own = flags.adapter is None or getattr(flags, name, None) is None
                expect(is_own, f"{what}and its samples() the decisions")
            config = from_flags(kind, flags)
            device = group.device(pick_device(config.device))
            agent = load(config, device, note if group.is_main else lambda text: None)
            job = Job.of(agent, config, group)
        if group.is_main:
            facts = dict(agent.facts)
            facts["Device"] += f", {group.size} processes" if group.size > 1 else ""
            facts["Samples"] += f"; {job.n_drawn} drawn"
            print(labelled(facts), flush=True)
        analyse(job)


def analyse(job: Job) -> None:
    """Measure, write the numbers, then draw; rank 0 prints and writes."""
    from historylens.pictures import CURVES, HEADS, clear_pictures

    agent, config, group = job.agent, job.config, job.group
    metrics = Metrics(len(agent.decisions), job.layers, job.heads)
    measure(job, metrics)
    shown = measure_drawn(job, metrics)
    metrics, parts, extra = metrics.gather(group), group.gather(shown), {}
    if metrics is not None:
        insights = find_patterns(metrics)
        wanted, is_off = (config.num_effects, config.seed), not config.num_effects
        with tqdm(desc="effects", unit=" steps", file=sys.stderr, disable=is_off) as bar:
            effects = measure_effects(agent, job.layers, job.heads, insights, *wanted, bar)
        insights = effects.attached(insights)
        extra = {CURVES: effects.curves_picture, HEADS: effects.heads_picture}
        extra = {name: content for name, content in extra.items() if content is not None}
        print(f"\n{write_numbers(job, metrics, insights, effects, parts)}", flush=True)
        clear_pictures(job.out)
    group.barrier()  # from here on pictures are drawn, and may fail
    n_drawn = group.gather(draw(job, metrics, shown.passes, extra))
    if n_drawn is not None:
        more = [name for name in (CURVES, HEADS) if (job.out / name).exists()]
        kinds = "a heatmap and a line plot a sample, a summary a layer"
        kinds = ", ".join([kinds, "attention_layers.png", *more])
        nothing = f"No picture could be drawn in {job.out}/"
        drawn = f"{sum(n_drawn)} pictures in {job.out}/: {kinds}" if sum(n_drawn) else nothing
        print("", wrap(f"{drawn}. All numbers: metrics.json, metrics.csv."), sep="\n")


def measure(job: Job, metrics: Metrics) -> None:
    """Metrics of the samples that are not drawn: a fair share of the passes over them."""
    agent = job.agent
    size = max(1, MAX_TOKENS // agent.n_tokens)
    rest = alike((i, agent.length(i)) for i in range(job.n_drawn, len(agent.decisions)))
    passes = [same[p.start : p.stop] for same in rest for p in even_parts(0, len(same), size)]
    own = [(passes[i], ()) for i in job.group.share(len(passes))]
    if own:
        with job.progress("metrics", sum(len(part) for part, _ in own), " samples") as bar:
            for batch in batches(job, own):
                batch.measure(metrics)
                bar.update(len(batch.indices))


def measure_drawn(job: Job, metrics: Metrics) -> Shown:
    """Metrics of the samples that are drawn, and the numbers that their pictures show.

    Every process runs the passes of which it draws a part.
    """
    from historylens.pictures import samples

    agent, group = job.agent, job.group
    size = min(MAX_DRAWN, max(1, MAX_DRAWN_TOKENS // agent.n_tokens))
    same = alike((i, agent.length(i)) for i in range(job.n_drawn))
    parts = [g[i : i + size] for g in same for i in range(0, len(g), size)]
    own = [tuple(i for i, n in enumerate(part) if n in group.share(job.n_drawn)) for part in parts]
    shown = Shown({layer: {} for layer in job.layers})
    passes = [pair for pair in zip(parts, own, strict=True) if pair[1]]
    with job.progress("attention", sum(len(part) for part, _ in passes), " samples") as bar:
        for batch in batches(job, passes):
            batch.measure(metrics)
            for layer, index, sample in samples(batch):
                shown.layers[layer][index] = sample.numbers()
                shown.tokens[index] = sample.tokens
            shown.passes.append((batch.indices, batch.drawn))
            bar.update(len(batch.indices))
    return shown


def draw(
    job: Job, metrics: Metrics | None, passes: Sequence[Pass], extra: Mapping[str, Any]
) -> int:
    """Draw this process's share, and with the metrics what compares samples; gives how many.

    `extra` are contents of further pictures, by name.

    The passes are run once more: their maps, all at once, would not fit memory.
    """
    from historylens.pictures import CURVES, HEADS, draw_batch, draw_summaries, n_pictures
    from historylens.pictures.curveplot import deletion_curves
    from historylens.pictures.headplot import head_effects
    from historylens.pictures.painter import Painter, drawing_processes

    out, dpi, n_heads = job.out, job.config.dpi, [*map(len, job.heads)]
    n_own = n_pictures(len(job.group.share(job.n_drawn)), n_heads) + len(extra)
    n_processes = drawing_processes(n_own) if job.group.size == 1 else 1
    kept = f"all numbers are in {out / 'metrics.json'}"
    progress = job.progress("pictures", n_own, " pictures")
    with progress as bar, Painter(n_processes, kept, bar.update) as painter:
        for batch in batches(job, passes):
            draw_batch(out, batch, painter, dpi)
        if metrics is not None:
            draw_summaries(out, metrics, painter, dpi)
        for name, content in extra.items():
            function = {CURVES: deletion_curves, HEADS: head_effects}[name]
            painter.draw(function, out / name, **content, dpi=dpi)
    return painter.n_drawn


def write_numbers(
    job: Job,
    metrics: Metrics,
    insights: Sequence[Insight],
    effects: MeasuredEffects,
    parts: Sequence[Shown],
) -> str:
    """Write the numbers, given what `measure_drawn` gave each process; the same as console text."""
    agent = job.agent
    tokens = {index: one for part in parts for index, one in part.tokens.items()}
    drawn = {
        layer: dict(sorted(item for part in parts for item in part.layers[layer].items()))
        for layer in job.layers
    }
    meta = {**vars(job.config), **agent.meta}
    meta |= {"device": agent.device.type, "n_layers": len(agent.layers)}
    content = report.metrics_json(metrics, agent.decisions, insights, meta, drawn, tokens)
    write_json(job.out / "metrics.json", content | {"effects": effects.json})
    report.write_csv(job.out / "metrics.csv", metrics, agent.decisions, agent.label_columns)
    blocks = [report.layer_table(metrics), report.overall_block(metrics)]
    blocks += [report.insight_blocks(insights, metrics), effects.text]
    return "\n\n".join(filter(None, blocks))


command = partial(run_command, main)  # `historylens`

if __name__ == "__main__":
    command()
