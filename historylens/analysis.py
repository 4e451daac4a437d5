"""The main job: which history an agent attends to, and what happens to its actions without it.

    historylens --adapter my_model.py                        # also: python visualize_attention.py
    historylens compare --adapter my_model.py                # `historylens.comparison`

From an agent and its decisions through one forward pass with capture to rows of attention, metrics,
insights, effects, pictures and files: `layer_N/*.png`, `attention_layers.png`,
`deletion_curves.png`, `metrics.json` and `metrics.csv` in the output folder.

Nothing is kept between passes: however many decisions there are, what a pass takes is bounded by
its tokens, and one that does not fit memory is halved. Passes are cut the same way however many
processes share them, so the numbers do not depend on that. With `--precision bfloat16` the model
runs in mixed precision; its attention is always computed and measured in float32 and float64.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from historylens.agent import Agent, attend, pick_device
from historylens.capture import CaptureError, LayerAttention
from historylens.common.batches import (
    MAX_DRAWN,
    MAX_DRAWN_TOKENS,
    MAX_TOKENS,
    alike,
    even_parts,
    is_out_of_memory,
)
from historylens.common.errors import UserError, note, run_command
from historylens.common.files import write_json
from historylens.common.processes import Group, join
from historylens.common.settings import add_flags, count, from_flags, setting, whole
from historylens.common.text import labelled
from historylens.history import Decision, History
from historylens.metrics import Metrics
from historylens.tokens import Tokens, sum_rows, uniform_rows

MAX_FIGURES = 50  # samples drawn where --num-figures does not say
CURVES = "deletion_curves.png"


@dataclass(frozen=True)
class AnalysisConfig:
    """What to analyse, and where the pictures go."""

    adapter: str | None = setting(
        None,
        "Python file that says how to run a model of your own, see examples/",
        "FILE",
        type=str,
    )
    num_samples: int = setting(10, "decisions to analyse", "N", type=count)
    num_figures: int | None = setting(
        None, "decisions to draw (default: all, 50 at most)", "N", type=whole
    )
    num_effects: int = setting(
        10,
        "decisions on which the effect of dropping history is measured; 0: none",
        "N",
        type=whole,
    )
    layers: list[int] | None = setting(
        None, "layers to analyse, from 0 (default: all)", "N", type=int, nargs="+"
    )
    heads: list[int] | None = setting(
        None,
        "heads to analyse and to average over, from 0 (default: all)",
        "N",
        type=int,
        nargs="+",
    )
    out: str = setting("figs/attention", "folder for pictures and numbers", "DIR")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "NAME")
    precision: str = setting(
        "float32",
        "of the model's forward pass; metrics are float64 whatever it is",
        choices=("float32", "bfloat16"),
    )
    seed: int = setting(0, "seed of the choice of decisions", "N", type=whole)
    dpi: int = setting(100, "pixels an inch of the pictures", "N", type=count)


Load = Callable[[Any, torch.device, Callable[[str], None]], Agent]


def command() -> None:
    """The command `historylens`."""
    run_command(main)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and analyse the model of an adapter; `compare` is a command of its own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        from historylens.comparison import main as compare

        return compare(argv[1:])
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


CHECKPOINT_FLAGS = ("checkpoint", "histories", "goal", "history", "steps", "stride")


def load_adapter(config: Any, device: torch.device, tell: Callable[[str], None]) -> Agent:
    """The model and the decisions of an adapter.

    Raises:
        UserError: there is no adapter, or it does not fit.
    """
    from historylens.adapter.agent import load

    if config.adapter is None:
        raise UserError("expected --adapter FILE, a Python file that says how to run your model")
    return load(config.adapter, config.num_samples, config.seed, device)


def run(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser, kind: type, load: Load
) -> None:
    """Parse the flags, load the agent, analyse it, with all processes that torchrun started.

    Args:
        argv: the arguments; None: those of the command line.
        parser: has a flag for every setting of `kind`.
        kind: `AnalysisConfig`, or a class of more settings.
        load: from settings, device and a function that tells the user something to the agent.
    """
    with join() as group:
        with group.told_once():
            flags = parser.parse_args(argv)
        with group.together():
            for name in CHECKPOINT_FLAGS:
                if flags.adapter is not None and getattr(flags, name, None) is not None:
                    raise UserError(
                        f"--{name} has no meaning beside --adapter: its load() chooses the model "
                        "and its samples() the decisions"
                    )
            config = from_flags(kind, flags)
            device = group.device(pick_device(config.device))
            agent = load(config, device, note if group.is_main else lambda text: None)
            job = Job.of(agent, config, group)
        if group.is_main:
            print(labelled(job.facts), flush=True)
        analyse(job)


@dataclass(frozen=True)
class Job:
    """What is analysed, how much of it is drawn, and where the files go.

    Attributes:
        agent: a model and its decisions.
        config: the settings.
        group: the processes that share the work.
        layers: numbers of the layers to capture.
        heads: numbers of the heads that are measured and drawn, for each of these layers.
        n_drawn: the first so many decisions are drawn.
        out: the output folder.
    """

    agent: Agent
    config: Any
    group: Group
    layers: list[int]
    heads: list[list[int]]
    n_drawn: int
    out: Path

    @classmethod
    def of(cls, agent: Agent, config: Any, group: Group) -> "Job":
        """Check everything; no file of an earlier run is touched.

        Raises:
            UserError: there is no such layer or head, or the output folder cannot be written.
        """
        from historylens.pictures import prepare_output

        layers = _chosen("layer", config.layers, len(agent.layers))
        n_heads = [agent.n_heads[layer] for layer in layers]
        shared = _chosen("head", config.heads, min(n_heads))
        heads = [shared if config.heads else list(range(n)) for n in n_heads]
        wanted = MAX_FIGURES if config.num_figures is None else config.num_figures
        n_drawn = min(len(agent.decisions), wanted)
        out = prepare_output(Path(config.out), layers)
        return cls(agent, config, group, layers, heads, n_drawn, out)

    @property
    def facts(self) -> dict[str, str]:
        """What was loaded, in words."""
        facts = dict(self.agent.facts)
        if self.group.size > 1:
            facts["Device"] += f", {self.group.size} processes"
        facts["Samples"] += f"; {self.n_drawn} drawn"
        return facts

    def progress(self, what: str, total: int, unit: str) -> tqdm:
        """A progress bar of rank 0's share."""
        label = what if self.group.size == 1 else f"{what}, rank 0 of {self.group.size}"
        is_off = not (total and self.group.is_main)
        return tqdm(total=total, desc=label, unit=unit, file=sys.stderr, disable=is_off)


def _chosen(what: str, wanted: list[int] | None, n: int) -> list[int]:
    """The layers or heads to analyse, ascending; all `n` of them unless some are asked for."""
    unknown = [number for number in wanted or [] if not 0 <= number < n]
    if unknown:
        raise UserError(f"unknown {what} {unknown[0]}: expected --{what}s in 0..{n - 1}")
    return sorted(set(wanted)) if wanted else list(range(n))


def analyse(job: Job) -> None:
    """Measure, draw, and write; rank 0 prints and writes the numbers."""
    from historylens.effects import measure_effects
    from historylens.insights import find_patterns
    from historylens.pictures import draw_summaries, n_pictures

    agent, config, group = job.agent, job.config, job.group
    metrics = Metrics(len(agent.decisions), job.layers, job.heads)
    measure(job, metrics)
    with painting(job) as painter:
        drawn = draw_samples(job, metrics, painter)
        metrics = metrics.gather(group)
        parts = group.gather(drawn)
        if metrics is None:
            return
        draw_summaries(job.out, metrics, painter, config.dpi)
        insights = find_patterns(metrics)
        with tqdm(
            desc="effects", unit=" steps", file=sys.stderr, disable=not config.num_effects
        ) as bar:
            effects = measure_effects(
                agent, job.layers, job.heads, insights, config.num_effects, config.seed, bar
            )
        if effects.is_drawn:
            effects.draw(job.out / CURVES, config.dpi)
        insights = effects.attached(insights)
        text = write_numbers(job, metrics, insights, effects, merged(parts))
    total = n_pictures(job.n_drawn, list(map(len, job.heads))) + effects.is_drawn
    curves = f",\n{CURVES} shows the effect of dropping history" if effects.is_drawn else ""
    print(
        f"\n{text}\n\n{total} pictures in {job.out}/: layer_N/ has a heatmap and a line plot a "
        f"sample and a summary,\nattention_layers.png compares the layers{curves}.\nAll numbers: "
        "metrics.json and metrics.csv there."
    )


def measure(job: Job, metrics: Metrics) -> None:
    """Metrics of the samples that are not drawn: a fair share of the passes over them."""
    agent = job.agent
    size = max(1, MAX_TOKENS // agent.n_tokens)
    rest = alike((i, agent.length(i)) for i in range(job.n_drawn, len(agent.decisions)))
    passes = [same[p.start : p.stop] for same in rest for p in even_parts(0, len(same), size)]
    own = [passes[i] for i in job.group.share(len(passes))]
    total = sum(map(len, own))
    if not total:
        return
    with job.progress("metrics", total, " samples") as bar:
        for batch in batches(job, [(indices, ()) for indices in own]):
            batch.measure(metrics)
            bar.update(len(batch.indices))


@contextlib.contextmanager
def painting(job: Job) -> Iterator[Any]:
    """Something to draw with, and a progress bar of rank 0's share of the pictures."""
    from historylens.pictures import n_pictures
    from historylens.pictures.painter import Painter, drawing_processes

    total = n_pictures(len(job.group.share(job.n_drawn)), list(map(len, job.heads)))
    n_processes = drawing_processes(total) if job.group.size == 1 else 1
    with (
        job.progress("pictures", total, " pictures") as bar,
        Painter(n_processes, bar.update) as painter,
    ):
        yield painter


def draw_samples(job: Job, metrics: Metrics, painter: Any) -> dict[int, dict[int, Any]]:
    """Metrics of the samples that are drawn, and their pictures; an earlier run's go first.

    Every process runs the passes of which it draws a part.

    Returns:
        The numbers in the pictures that this process drew: layer -> sample -> arrays.
    """
    from historylens.pictures import clear_pictures, draw_batch

    agent, group = job.agent, job.group
    size = min(MAX_DRAWN, max(1, MAX_DRAWN_TOKENS // agent.n_tokens))
    same = alike((i, agent.length(i)) for i in range(job.n_drawn))
    parts = [(g[i : i + size]) for g in same for i in range(0, len(g), size)]
    own = [tuple(i for i, n in enumerate(part) if n % group.size == group.rank) for part in parts]
    passes = batches(job, [pair for pair in zip(parts, own, strict=True) if pair[1]])
    first = next(passes, None)  # what fails has failed before a file is removed
    group.barrier()
    with group.together():
        if group.is_main:
            clear_pictures(job.out)
    drawn: dict[int, dict[int, Any]] = {layer: {} for layer in job.layers}
    for batch in itertools.chain([] if first is None else [first], passes):
        batch.measure(metrics)
        numbers = draw_batch(job.out, batch, painter, job.config.dpi)
        for layer, arrays in numbers.items():
            drawn[layer] |= arrays
    return drawn


def merged(parts: Sequence[dict[int, dict[int, Any]]]) -> dict[int, dict[int, Any]]:
    """Arrays of drawn samples from all processes, in the order of samples."""
    return {
        layer: dict(sorted(item for part in parts for item in part[layer].items()))
        for layer in parts[0]
    }


@dataclass(frozen=True)
class Batch:
    """What one forward pass showed of `B` decisions.

    Attributes:
        indices: numbers of the decisions.
        history: the transitions before them.
        decisions: those that are drawn, in the order of the maps.
        tokens: what each token is, `B` maps.
        attention: layer number -> attention of the chosen heads.
        heads: layer number -> numbers of these heads.
        drawn: which of the `B` come with a map, in the order of the maps.
        uniform_rows: `(B, T)`, the row that weighs all that the query may see equally.
    """

    indices: Sequence[int]
    history: History
    tokens: Sequence[Tokens]
    attention: Mapping[int, LayerAttention]
    heads: Mapping[int, Sequence[int]]
    drawn: Sequence[int]
    uniform_rows: np.ndarray
    decisions: Sequence[Decision]

    def measure(self, metrics: Metrics) -> None:
        """Put the metrics of the batch in their place."""
        rows = [sum_rows(layer.query_rows, self.tokens) for layer in self.attention.values()]
        metrics.put(self.indices, rows, sum_rows(self.uniform_rows, self.tokens), self.history)


def batches(job: Job, parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Batch]:
    """Passes over decisions and which of them to draw; what does not fit memory is halved."""
    limit = max((len(indices) for indices, _ in parts), default=0)
    told = False
    for indices, drawn in parts:
        start = 0
        while start < len(indices):
            piece = indices[start : start + limit]
            maps = [i - start for i in drawn if start <= i < start + len(piece)]
            batch = _attempt(job, piece, maps)
            if batch is not None:
                yield batch
                start += len(piece)
                continue
            limit = _halve(job, len(piece), told)
            told = True


def _attempt(job: Job, indices: Sequence[int], drawn: Sequence[int]) -> Batch | None:
    """One pass; None if it does not fit memory. What it held is free once this returns."""
    try:
        return _run(job, indices, drawn)
    except CaptureError as error:
        raise UserError(f"attention cannot be captured: {error}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def _halve(job: Job, n_samples: int, told: bool) -> int:
    """Half of a batch that was too large, said on stderr the first time."""
    device = job.agent.device
    if n_samples == 1:
        raise UserError(
            f"a single sample of {job.agent.n_tokens} tokens does not fit the memory of {device}: "
            "analyse fewer layers at once (--layers), draw fewer samples (--num-figures) or use "
            "another --device"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    half = n_samples // 2
    if not told:
        tqdm.write(
            f"note: a batch of {n_samples} samples does not fit the memory of {device}; going on "
            f"with {half} or fewer",
            file=sys.stderr,
        )
    return half


def _run(job: Job, indices: Sequence[int], drawn: Sequence[int]) -> Batch:
    """One forward pass, each layer captured as it runs."""
    agent = job.agent
    history = agent.history(indices)
    with _autocast(agent.device, job.config.precision):
        _, layers = attend(agent, history, job.layers, received=bool(drawn), maps=drawn)
    visible = np.logical_or.reduce([layer.visible.numpy() for layer in layers])
    attention = {
        number: layer if len(heads) == agent.n_heads[number] else _of_heads(layer, heads)
        for number, layer, heads in zip(job.layers, layers, job.heads, strict=True)
    }
    return Batch(
        indices,
        history,
        agent.tokens(history),
        attention,
        dict(zip(job.layers, job.heads, strict=True)),
        drawn,
        uniform_rows(visible),
        [agent.decisions[indices[i]] for i in drawn],
    )


def _of_heads(layer: LayerAttention, heads: list[int]) -> LayerAttention:
    parts = {"query_rows": layer.query_rows, "received": layer.received, "maps": layer.maps}
    return replace(layer, **{k: v[:, heads] for k, v in parts.items() if v is not None})


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def write_numbers(
    job: Job, metrics: Metrics, insights: Sequence[Any], effects: Any, drawn: Mapping[int, Any]
) -> str:
    """Write `metrics.json` and `metrics.csv`; gives what they say as console text."""
    from historylens import report

    agent = job.agent
    meta = {**vars(job.config), **agent.meta, "device": agent.device.type}
    meta |= {"n_layers": len(agent.layers)}
    content = report.metrics_json(metrics, agent.decisions, insights, meta, drawn)
    content["effects"] = effects.content
    write_json(job.out / "metrics.json", content)
    report.write_csv(job.out / "metrics.csv", metrics, agent.decisions, agent.label_columns)
    blocks = [report.layer_table(metrics), report.overall_block(metrics)]
    blocks += [report.pattern_table(metrics)] if len(metrics.layers) > 1 else []
    blocks += [report.insight_blocks(insights, metrics)]
    blocks += [effects.text] if effects.text else []
    return "\n\n".join(blocks)


if __name__ == "__main__":
    command()
