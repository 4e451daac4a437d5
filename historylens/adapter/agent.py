"""A model of the user's as an `Agent`.

    agent = load("my_model.py", n=10, seed=0, device=torch.device("cpu"))
    agent.act(agent.history([0, 1]))                   # (2, A), through the adapter's act()
    agent = load_acting("my_model.py", seed=0, device=torch.device("cpu"))
    agent.environment.make(np.array([0, 1])).reset()   # (2, S), through its make_env()

Loading runs the model once and checks that adapter and model fit each other: what is wrong is told
in one line before anything is written.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from historylens.adapter.decisions import read_decisions
from historylens.adapter.environment import GymRooms, read_tasks
from historylens.adapter.file import Adapter, kind, load_adapter
from historylens.agent import Agent, Environment, where_of
from historylens.capture import CaptureError, LayerAttention, capture
from historylens.common.errors import UserError
from historylens.history import History
from historylens.tokens import Tokens

CAPTURE = ("softmax", "heads")  # arguments of capture that an adapter may give
N_TRIED = 4  # samples that are read to see what the model takes


def load(path: str | Path, n: int, seed: int, device: torch.device) -> "AdapterAgent":
    """The model of an adapter, with up to `n` decisions to analyse.

    Raises:
        UserError: something raises, is missing, or does not fit.
    """
    agent = AdapterAgent(load_adapter(path), n, seed, device)
    heads = " or ".join(map(str, sorted(set(agent.n_heads))))
    n_parameters = sum(p.numel() for p in agent.model.parameters())
    tokens = agent.tokens(agent.history([agent.longest]))[0]
    shortest, longest = min(d.n for d in agent.decisions), tokens.n
    lengths = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    each = ", ".join(tokens.parts) if len(tokens.parts) > 1 else "one token"
    n_decisions = len(agent.decisions)
    fewer = f", which has no more of the {n} asked for" if n_decisions < n else ""
    agent.facts = {
        "Adapter": str(path),
        "Model": f"{type(agent.model).__name__}: {len(agent.layers)} layers x {heads} heads, "
        f"{n_parameters:,} parameters",
        "Context length": f"{lengths} transitions, {len(tokens)} tokens at most; a transition is "
        f"{each}; token {tokens.decides} decides; metrics are of whole transitions",
        "Device": str(device),
        "Samples": f"{n_decisions} decisions of the adapter{fewer}",
    }
    agent.meta = {"n_heads": list(agent.n_heads), "model": type(agent.model).__name__}
    return agent


def load_acting(path: str | Path, seed: int, device: torch.device) -> "AdapterAgent":
    """The model of an adapter in its own environments.

    Raises:
        UserError: the adapter lacks an environment, or something does not fit.
    """
    adapter = load_adapter(path)
    goals, horizon = read_tasks(adapter)
    agent = AdapterAgent(adapter, N_TRIED, seed, device)
    state = agent.decisions[0].query_state

    def make(numbers: np.ndarray) -> GymRooms:
        return GymRooms(adapter, np.asarray(numbers).tolist(), horizon, state, seed)

    make(np.zeros(1, dtype=int)).reset()
    agent.environment = Environment(goals, horizon, make)
    agent.facts, agent.meta = {"Adapter": str(path)}, {"adapter": str(path)}
    return agent


class AdapterAgent(Agent):
    """A model that an adapter gives, and decisions of its samples: see `Agent`."""

    def __init__(self, adapter: Adapter, n: int, seed: int, device: torch.device) -> None:
        self.adapter, self.device = adapter, device
        self.model = self._load_model()
        self.decisions = read_decisions(adapter, n, seed)
        self.n_max = self._read_n_max()
        self.layers, self.n_heads = self._try()
        self.title = f"{type(self.model).__name__} of {adapter.path.name}"
        self.label_columns = tuple(dict.fromkeys(k for one in self.decisions for k in one.labels))

    @torch.inference_mode()
    def act(self, history: History, positions: Tensor | None = None) -> Tensor:
        """Action logits `(B, A)` on any history that the model can read."""
        with self.adapter.blamed("act()"):
            logits = self.adapter.module.act(self.model, history)
            is_fit = isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1]
            size = history.size
            if not is_fit or len(logits) != size:
                expected = f"action logits of shape ({size}, A) for {size} histories"
                raise self.adapter.wrong("act()", expected, kind(logits))
            if not logits.isfinite().all():
                raise self.adapter.wrong("act()", "finite logits", "some that are not")
        return logits

    def tokens(self, history: History) -> list[Tokens]:
        """What each token of a batch of histories is; a map each."""
        if self.adapter.get("tokens") is None:
            return super().tokens(history)
        maps = self.adapter.call("tokens", history)
        maps = [maps] * history.size if isinstance(maps, Tokens) else maps
        is_list = isinstance(maps, list | tuple) and len(maps) == history.size
        if not is_list or not all(isinstance(one, Tokens) for one in maps):
            raise self.adapter.wrong(
                "tokens()", f"a Tokens, or a list of one for each of {history.size}", kind(maps)
            )
        for one in maps:
            if one.n != history.n or len(one) != len(maps[0]):
                raise self.adapter.wrong(
                    "tokens()",
                    f"a map of {history.n} transitions, equally long for the whole batch",
                    f"one of {one.n} transitions and {len(one)} tokens",
                )
        return list(maps)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the file, and of all parameters and buffers of the model."""
        weights = hashlib.sha256()
        for name, values in self.model.state_dict().items():
            weights.update(name.encode())
            if isinstance(values, Tensor):
                flat = values.detach().cpu().contiguous().flatten()
                weights.update(flat.view(torch.uint8).numpy())
        adapter = hashlib.sha256(self.adapter.path.read_bytes())
        return {"adapter": adapter.hexdigest(), "weights": weights.hexdigest()}

    @property
    def longest(self) -> int:
        """The decision after the longest history."""
        return max(range(len(self.decisions)), key=self.length)

    def _load_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an untrained model is the same in each process and run
            model = self.adapter.call("load")
        if not isinstance(model, nn.Module):
            raise self.adapter.wrong("load()", "a torch.nn.Module", kind(model))
        with self.adapter.blamed(f"moving the model to {self.device}"):
            return model.to(self.device).eval()

    def _read_n_max(self) -> int:
        """Transitions that the model can read: the adapter's N_MAX, or those of the samples."""
        most = self.decisions[self.longest].n
        n_max = self.adapter.get("N_MAX", most)
        if not isinstance(n_max, int) or n_max < 1:
            expected = "a whole number, the transitions that the model can read"
            raise self.adapter.wrong("N_MAX", expected, repr(n_max))
        if most > n_max:
            expected = f"at most N_MAX = {n_max} transitions"
            raise self.adapter.wrong(f"samples()[{self.longest}]", expected, str(most))
        return n_max

    def _try(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Layers and their heads, from a pass that shows whether adapter and model fit."""
        same = [i for i, one in enumerate(self.decisions) if one.n == self.decisions[0].n][:2]
        history = self.history(same)
        maps = self.tokens(history)
        self.capture_options = self._read_capture_options()
        where, misled = where_of(maps), None
        try:
            layers = self._one_pass(history, where)
        except UserError as error:
            if not where or not isinstance(error.__cause__, CaptureError):
                raise
            layers, misled = self._one_pass(history, {}), error
        given = "tokens()" if self.adapter.get("tokens") is not None else "no tokens(), so"
        for layer in layers:
            if layer.query_rows.shape[-1] != len(maps[0]):
                raise self.adapter.wrong(
                    given,
                    f"a map of the {layer.query_rows.shape[-1]} tokens that {layer.name} attends "
                    f"over (with {history.n} transitions before the decision)",
                    f"one of {len(maps[0])} tokens",
                )
        if misled is not None:
            raise misled
        return tuple(x.name for x in layers), tuple(x.query_rows.shape[1] for x in layers)

    def _one_pass(self, history: History, where: dict[str, Any]) -> list[LayerAttention]:
        with (
            self.adapter.blamed("act()"),
            torch.inference_mode(),
            capture(self.model, received=False, **where, **self.capture_options) as record,
        ):
            self.act(history)
        return list(record)

    def _read_capture_options(self) -> dict[str, Any]:
        """Arguments of capture that the adapter gives: its CAPTURE, and its layers() by name."""
        options = self.adapter.get("CAPTURE", {})
        if not isinstance(options, dict) or not set(options) <= set(CAPTURE):
            expected = f"a dict with {' and '.join(CAPTURE)}"
            raise self.adapter.wrong("CAPTURE", expected, repr(options))
        if self.adapter.get("layers") is None:
            return dict(options)
        layers = self.adapter.call("layers", self.model)
        layers = [layers] if isinstance(layers, str) else layers
        if not isinstance(layers, list | tuple | nn.ModuleList) or not len(layers):
            raise self.adapter.wrong("layers()", "a list of modules or their names", kind(layers))
        known = {module: name for name, module in self.model.named_modules()}
        for layer in layers:
            if not isinstance(layer, str) and layer not in known:
                raise self.adapter.wrong("layers()", "modules of the model", kind(layer))
        return options | {"layers": [known.get(layer, layer) for layer in layers]}
