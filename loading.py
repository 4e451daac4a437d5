"""What the user named, loaded and checked: checkpoint, histories and decisions, or an adapter.

loaded = load(config, pick_device("auto"))
loaded.subject, loaded.facts
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapter.file import load_adapter
from adapter.subject import AdaptedSubject
from attention.files import LABEL_COLUMNS
from checkpoint import find_checkpoint, load_checkpoint
from config import UserError, VisualizeConfig, same_as_default
from decisions import Filter, choose_decisions
from hdf5 import to_stderr
from histories import histories_path, read_histories
from subject import ADSubject, Subject


@dataclass(frozen=True)
class Loaded:
    """What is analysed, and how it is named on the console and in `metrics.json`.

    Attributes:
        subject: the model and its decisions.
        facts: name -> what was loaded, in words.
        meta: the same as plain values.
        label_columns: labels that name a sample, in the order of the table's columns.
    """

    subject: Subject
    facts: Mapping[str, str]
    meta: Mapping[str, Any]
    label_columns: Sequence[str] = LABEL_COLUMNS


def load(
    config: VisualizeConfig, device: torch.device, tell: Callable[[str], None] = to_stderr
) -> Loaded:
    """Load everything; nothing is written.

    Args:
        config: what to load.
        device: where the model will lie.
        tell: called with a line of text that the user should read.

    Raises:
        UserError: something is missing, damaged, or does not fit.
    """
    if config.adapter is not None:
        return load_adapted(config, device)
    choice = find_checkpoint(config.checkpoint)
    checkpoint = load_checkpoint(choice.path, device)
    path = histories_path(config.histories, checkpoint)
    histories = read_histories(path, checkpoint, tell)
    decisions = choose_decisions(
        histories,
        checkpoint.model.n_context_max,
        config.num_samples,
        config.seed,
        config.stride,
        Filter(config.goal, config.history, config.steps),
    )
    subject = ADSubject(checkpoint.model, histories, decisions)
    model = checkpoint.model.config
    facts = {
        "Checkpoint": f"{choice.path} ({choice.reason})",
        "Step": f"{checkpoint.step:,} gradient updates",
        "Model": f"{model.tf_n_layer} layers x {model.tf_n_head} heads, width {model.tf_n_embd}, "
        f"{sum(p.numel() for p in checkpoint.model.parameters()):,} parameters",
        "Context length": f"{model.n_transit - 1} transitions, then the query token "
        f"({model.n_transit} tokens)",
        "Device": str(device),
        "Histories": f"{path} ({histories.n_histories} histories of {histories.n_steps:,} steps, "
        f"{len(set(map(tuple, histories.goals.tolist())))} goals)",
        "Samples": samples_fact(subject),
    }
    meta = {
        "checkpoint": str(choice.path),
        "step": checkpoint.step,
        "histories": str(path),
        "n_transit": model.n_transit,
        "n_heads": model.tf_n_head,
    }
    return Loaded(subject, facts, meta)


def load_adapted(config: VisualizeConfig, device: torch.device) -> Loaded:
    """Load a model and decisions through the user's adapter.

    Raises:
        UserError: the adapter does not fit, or flags are given that only a checkpoint can use.
    """
    for name in ("checkpoint", "histories", "goal", "history", "steps", "stride"):
        if not same_as_default(config, name):
            raise UserError(
                f"--{name} has no meaning beside --adapter: its load() chooses the model and its "
                "samples() the decisions"
            )
    subject = AdaptedSubject.of(
        load_adapter(config.adapter), config.num_samples, config.seed, device
    )
    facts = {"Adapter": config.adapter, **subject.facts, "Device": str(device)}
    facts["Samples"] = f"{subject.n_samples} decisions of the adapter"
    if subject.n_samples < config.num_samples:
        facts["Samples"] += f", which has no more of the {config.num_samples} asked for"
    meta = {"n_heads": list(subject.n_heads), "model": type(subject.model).__name__}
    labels = dict.fromkeys(name for one in subject.decisions for name in one.labels)
    return Loaded(subject, facts, meta, tuple(labels))


def samples_fact(subject: ADSubject) -> str:
    """Which decisions were chosen, in words."""
    decisions = subject.decisions
    goals = {tuple(subject.histories.goals[d.history].tolist()) for d in decisions}
    used = {d.history for d in decisions}
    steps = [d.step for d in decisions]
    return (
        f"{len(decisions)} decisions of {len(goals)} goals and {len(used)} histories, "
        f"steps {min(steps):,} to {max(steps):,}"
    )
