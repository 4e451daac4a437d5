"""The AD model as an agent: a checkpoint, and decisions from learning histories."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ad.acting import fast_logits
from ad.checkpoints import MAX_WEIGHT, Checkpoint, find_checkpoint, load_checkpoint, task_of
from ad.darkroom import N_ACTIONS, TASKS, DarkRoom, optimal_return
from ad.decisions import HistoryDecisions, choose_decisions
from ad.histories import histories_path, read_histories
from config import EnvConfig
from historylens.agent import Agent, Environment
from historylens.analysis import CHECKPOINT_FLAGS
from historylens.common.errors import expect
from historylens.common.text import counted
from historylens.history import Decision, History


class ADAgent(Agent):
    """A checkpoint's model, with or without decisions, each with a full context."""

    can_place = reads_inputs_alone = True

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, decisions: Sequence[Decision] = ()
    ) -> None:
        self.checkpoint, self.model, self.device = checkpoint, checkpoint.model, device
        self.decisions, self.task, config = decisions, checkpoint.task, self.model.config
        self.meta = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
        self.n_max, self.room = self.model.n_context_max, (config.grid_size, config.grid_size)
        self.layers = [f"transformer_encoder.layers.{i}" for i in range(config.tf_n_layer)]
        self.n_heads = [config.tf_n_head] * config.tf_n_layer
        size = f"{counted(config.tf_n_layer, 'layer')}, {counted(config.n_transit, 'token')}"
        self.title = f"AD in {self.task.title}, {size}"

    def act(self, history: History, positions: Tensor | None = None) -> Tensor:
        """Action logits `(B, A)`, by a walk of the encoder that spares what only others need."""
        return self._finite(fast_logits(self.model, history, positions))

    def forward(self, history: History) -> Tensor:
        """Action logits `(B, A)` by the model's own forward pass."""
        return self._finite(self.model(*history.inputs))

    def _finite(self, logits: Tensor) -> Tensor:
        what = f"{self.checkpoint.path}: its model has diverged: it gives actions no finite numbers"
        expect(logits.isfinite().all(), what)
        return logits

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The checkpoint's digest, and the room."""
        digest = hashlib.sha256(self.checkpoint.path.read_bytes()).hexdigest()
        return {"checkpoint": digest, "grid_size": self.model.config.grid_size}

    @cached_property
    def environment(self) -> Environment:
        """Its task, on the test goals of the checkpoint; UserError: there are none that fit it."""
        path, config = self.checkpoint.path, self.checkpoint.config
        n_actions, env = self.model.config.num_actions, task_of(config)
        what = f"a model of env {' or '.join(map(repr, TASKS))} with {N_ACTIONS} actions to act"
        got = f"env {config.get('env')!r} with {n_actions}; its attention can be shown"
        expect(env and n_actions == N_ACTIONS, f"{path}: expected {what}, got {got}")
        what = "expected its goals to have a list 'test', goals that the model was not trained on"
        goals, how = self.checkpoint.goals.get("test"), "train again, or name another --checkpoint"
        expect(goals, f"{path} holds no test goals: {what}; {how}")
        horizon, goals = config.get("horizon") or EnvConfig.horizon, np.array(goals)
        room = {"grid_size": self.model.config.grid_size, "horizon": horizon, "env": env}
        n_hidden = len(self.task.hidden)
        return Environment(
            goals=tuple(self.task.name(goal) for goal in goals),
            horizon=horizon,
            make=lambda numbers, seeds: DarkRoom(goals[numbers], **room, seeds=seeds),
            best=tuple(optimal_return(goals, **room).tolist()),
            named=("goal" if n_hidden == 1 else "task", "never trained on"),
            goal_states=goals.reshape(-1, n_hidden, 2),
        )


def _load(where: str, device: torch.device) -> ADAgent:
    path, reason = find_checkpoint(where)
    agent = ADAgent(load_checkpoint(path, device, MAX_WEIGHT), device)
    agent.facts = {"Checkpoint": f"{path} ({reason})"}
    return agent


def load_for_analysis(config: Any, device: torch.device) -> ADAgent:
    """Load the checkpoint of a `VisualizeConfig`, and decisions, if it plays none of its own."""
    given = [f"--{name}" for name in CHECKPOINT_FLAGS[1:] if vars(config)[name] not in (None, 1)]
    what = "has no meaning beside --play: its decisions come from no histories"
    expect(not (config.plays and given), f"{' '.join(given[:1])} {what}")
    agent = _load(config.checkpoint, device)
    model, n_parameters = agent.model.config, sum(p.numel() for p in agent.model.parameters())
    agent.facts |= {
        "Step": f"{agent.checkpoint.step:,} gradient updates in {agent.task.title}, "
        f"{model.grid_size} x {model.grid_size}",
        "Model": f"{counted(model.tf_n_layer, 'layer')} x {counted(model.tf_n_head, 'head')}, "
        f"width {model.tf_n_embd}, {n_parameters:,} parameters",
        "Context length": f"{counted(agent.n_max, 'transition')}, then the query token "
        f"({counted(model.n_transit, 'token')})",
        "Device": str(device),
    }
    agent.rewarded_above = above = config.rewarded_above or 0.0
    if not config.plays:
        _choose_decisions(agent, config)
    agent.facts |= {"Rewarded": f"rewards above {above:g}"} if above else {}
    more = {"n_transit": model.n_transit, "n_heads": model.tf_n_head, "rewarded_above": above}
    agent.meta |= more
    return agent


def _choose_decisions(agent: ADAgent, config: Any) -> None:
    path = histories_path(config.histories, agent.checkpoint)
    histories = read_histories(path, agent.checkpoint)
    only = config.stride, config.goal, config.history, config.steps
    places = choose_decisions(histories, agent.n_max, config.num_samples, config.seed, *only)
    used, steps = list({place.history for place in places}), {place.step for place in places}
    goals = histories.goals
    there, asked = (counted(len(np.unique(x, axis=0)), "goal") for x in (goals, goals[used]))
    when = f"steps {min(steps):,} to {max(steps):,}" if len(steps) > 1 else f"step {min(steps):,}"
    agent.facts |= {
        "Histories": f"{path} ({len(goals)} of {counted(histories.n_steps, 'step')}, {there})",
        "Samples": f"{counted(len(places), 'decision')} of {asked} and "
        f"{counted(len(used), 'history')}, {when}",
    }
    agent.meta["histories"] = str(path)
    options = agent.n_max, agent.rewarded_above, agent.task
    agent.decisions = HistoryDecisions(histories, places, *options)


def load_for_acting(config: Any, device: torch.device) -> ADAgent:
    """Load the checkpoint of an `ActingConfig`; UserError: its model cannot act on history."""
    agent = _load(config.checkpoint, device)
    _ = agent.environment  # what is wrong with it is told before anything is played
    what = "its model reads no history: there is nothing to compress"
    expect(agent.n_max, f"{agent.checkpoint.path}: {what}")
    return agent
