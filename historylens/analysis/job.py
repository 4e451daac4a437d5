"""Forward passes over the decisions of an agent, each layer captured as it runs.

    job = Job.of(agent, AnalysisConfig(), group)
    for batch in batches(job, [([0, 1, 2], [0])]):               # three decisions, the first drawn
        metrics.put(batch.indices, batch.rows, batch.even, batch.history)

Passes are cut the same way however many processes share them, so numbers do not depend on that.
With bfloat16 the model runs in mixed precision; attention is float32, and measured in float64.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from historylens.agent import Agent, attend
from historylens.capture import CaptureError, LayerAttention
from historylens.common.batches import MAX_DRAWN, MAX_DRAWN_TOKENS, alike, expect_memory
from historylens.common.errors import UserError, expect, is_out_of_memory
from historylens.common.processes import Group
from historylens.history import Decision, History
from historylens.tokens import Tokens, sum_rows, uniform_rows

Pass = tuple[Sequence[int], Sequence[int]]  # numbers of decisions, places of those drawn
BY_HEAD = ("query_rows", "received", "maps", "extra")  # of a LayerAttention


@dataclass(frozen=True)
class Job:
    """What is analysed, how much of it is drawn, and where the files go."""

    agent: Agent
    config: Any
    group: Group
    layers: list[int]  # numbers of the layers to capture
    heads: list[list[int]]  # of each of these, numbers of the heads that are measured and drawn
    out: Path

    @classmethod
    def of(cls, agent: Agent, config: Any, group: Group) -> "Job":
        """Check all that settings ask for, in a UserError; no file of an earlier run is touched."""
        from historylens.pictures import prepare_output

        layers = _chosen("layer", config.layers, len(agent.layers))
        n_heads = [agent.n_heads[layer] for layer in layers]
        shared = _chosen("head", config.heads, min(n_heads))
        heads = [shared if config.heads else list(range(n)) for n in n_heads]
        if config.plays:
            expect(agent.n_max, f"{agent.title}: it reads no history: there is nothing to look at")
            last = len(agent.environment.goals) * config.rollouts - 1
            n_decisions = (last + 1) * config.episodes * agent.environment.horizon
            each = 20 * (len(layers) + 1)  # bytes: shares of five kinds, beside even ones
            expect_memory(each * n_decisions, "--episodes or --rollouts")
            what = f"expected --trajectory in 0..{last}, a rollout, got {config.trajectory}"
            expect(config.trajectory is None or config.trajectory <= last, what)
        job = cls(agent, config, group, layers, heads, Path(config.out))
        prepare_output(job.out, layers, job.followed)
        return job

    @property
    def n_drawn(self) -> int:
        """The first so many decisions are drawn."""
        return min(len(self.agent.decisions), self.config.num_figures)

    @property
    def followed(self) -> Path | None:
        """Folder of the rollout that is drawn step by step."""
        number = self.config.trajectory
        return None if number is None else self.out / f"trajectory_{number}"

    def progress(self, what: str, total: int, unit: str) -> tqdm:
        """A progress bar of rank 0's share; none without a label or a total."""
        label = what if self.group.size == 1 else f"{what}, rank 0 of {self.group.size}"
        is_off = not (what and total and self.group.is_main)
        return tqdm(total=total, desc=label, unit=unit, file=sys.stderr, disable=is_off)


def _chosen(what: str, wanted: list[int] | None, n: int) -> list[int]:
    """The layers or heads to analyse, ascending; all `n` of them unless some are asked for."""
    for number in wanted or []:
        expect(0 <= number < n, f"unknown {what} {number}: expected --{what}s in 0..{n - 1}")
    return sorted(set(wanted)) if wanted else list(range(n))


@dataclass(frozen=True)
class Batch:
    """What one forward pass showed of `B` decisions, of the heads that are chosen."""

    history: History  # the transitions before them
    logits: Tensor  # (B, A) of actions
    tokens: Sequence[Tokens]  # what each token is, B maps
    attention: Mapping[int, LayerAttention]  # by the number of the layer
    uniform_rows: np.ndarray  # (B, T), the row that weighs all that the query may see equally
    rows: Sequence[np.ndarray]  # (B, H, n + 1) a layer: on each transition, then what is of none
    even: np.ndarray  # (B, n + 1), the same of `uniform_rows`
    indices: Sequence[int]  # numbers of the decisions
    drawn: Sequence[int]  # which of the B come with a map, in the order of the maps
    decisions: Sequence[Decision]  # those that are drawn, in the order of the maps
    heads: Mapping[int, Sequence[int]]  # by the number of the layer, numbers of its chosen heads


def batches(job: Job, parts: Sequence[Pass], label: str = "") -> Iterator[Batch]:
    """Passes, halved where one does not fit memory; `label` is that of a progress bar, if any."""
    limit = largest = max((len(indices) for indices, _ in parts), default=0)
    with job.progress(label, sum(len(indices) for indices, _ in parts), " samples") as bar:
        for indices, drawn in parts:
            start = 0
            while start < len(indices):
                piece, batch = indices[start : start + limit], None
                own = [i - start for i in drawn if 0 <= i - start < len(piece)]
                try:
                    batch = see(job, job.agent.history(piece), piece, own)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                if batch is None:  # what the pass held is free by now
                    limit = _halve(job, len(piece), is_first=limit == largest)
                    continue
                yield batch
                start += len(piece)
                bar.update(len(piece))


def _halve(job: Job, n_samples: int, is_first: bool) -> int:
    """Half of a batch that was too large, said on stderr the first time."""
    what, half = f"does not fit the memory of {job.agent.device}", n_samples // 2
    other = "analyse fewer layers at once (--layers), draw fewer samples (--num-figures) or use"
    single = f"a single sample of {job.agent.n_tokens} tokens {what}"
    expect(half, f"{single}: {other} another --device")
    torch.cuda.empty_cache()
    if is_first:
        told = f"note: a batch of {n_samples} samples {what}; going on with {half} or fewer"
        tqdm.write(told, file=sys.stderr)
    return half


def see(
    job: Job, history: History, indices: Sequence[int] = (), drawn: Sequence[int] = ()
) -> Batch:
    """One captured forward pass; UserError: attention cannot be captured."""
    agent, is_mixed = job.agent, job.config.precision == "bfloat16"
    try:
        with torch.autocast(agent.device.type, torch.bfloat16, enabled=is_mixed):
            logits, layers = attend(agent, history, job.layers, received=bool(drawn), maps=drawn)
    except CaptureError as error:
        raise UserError(f"attention cannot be captured: {error}") from error
    uniform = uniform_rows(np.logical_or.reduce([layer.visible.numpy() for layer in layers]))
    tokens, attention, rows = agent.tokens(history), {}, []
    for number, heads, layer in zip(job.layers, job.heads, layers, strict=True):
        if len(heads) < agent.n_heads[number]:
            arrays = {name: vars(layer)[name] for name in BY_HEAD}
            layer = replace(layer, **{k: v[:, heads] for k, v in arrays.items() if v is not None})
        attention[number] = layer
        rows.append(sum_rows(layer.query_rows, tokens))
        rows[-1][..., -1] += 0 if layer.extra is None else layer.extra.numpy()
    decisions = [agent.decisions[indices[i]] for i in drawn]
    seen = history, logits, tokens, attention, uniform, rows, sum_rows(uniform, tokens)
    return Batch(*seen, indices, drawn, decisions, dict(zip(job.layers, job.heads, strict=True)))


def drawn_passes(job: Job, n_drawn: int) -> list[Pass]:
    """Passes over the first `n_drawn` decisions, of which this process draws a share."""
    agent, group = job.agent, job.group
    size = min(MAX_DRAWN, max(1, MAX_DRAWN_TOKENS // agent.n_tokens))
    same = alike(range(n_drawn), agent.length)
    parts = [g[i : i + size] for g in same for i in range(0, len(g), size)]
    own = [[i for i, n in enumerate(part) if n in group.share(n_drawn)] for part in parts]
    return [pair for pair in zip(parts, own, strict=True) if pair[1]]
