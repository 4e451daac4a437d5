"""A model of the user's as an `Agent`: loading runs and checks it, before anything is written."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from historylens.adapter.checks import tried
from historylens.adapter.file import Adapter, kind
from historylens.adapter.given import GymRooms, as_array, read_decisions, read_rewarded, read_tasks
from historylens.agent import Agent, Environment, seed_globals
from historylens.common.errors import note
from historylens.common.text import counted
from historylens.history import Decision, History
from historylens.tokens import Tokens

MAX_SIDE = 200  # rows, and columns, of a room
N_TRIED = 10  # samples by which rewarded transitions are told; a comparison reads no more


def load(
    path: str | Path | None,
    n: int,
    seed: int,
    device: torch.device,
    rewarded_above: float | None = None,
    plays: bool = False,
) -> "AdapterAgent":
    """An adapter's model, with up to `n` decisions, or to play; UserError: it does not fit."""
    adapter = Adapter(path)
    tasks = read_tasks(adapter) if plays else None
    agent = AdapterAgent(adapter, N_TRIED if plays else n, seed, device, rewarded_above)
    agent.tell_doubts()
    if tasks is not None:
        make = partial(GymRooms, adapter, agent.decisions[0].query_state, tasks[1])
        make(np.zeros(1, dtype=int), [seed]).reset()
        agent.environment = Environment(*tasks, make)
    model, decisions = type(agent.model).__name__, agent.decisions
    heads = " or ".join(map(str, sorted(set(agent.n_heads))))
    size = sum(p.numel() for p in agent.model.parameters())
    beside = f"; beside them unseen: {', '.join(agent.unseen)}" if agent.unseen else ""
    counts = [one.n for one in decisions]
    lengths = " to ".join(map(str, sorted({min(counts), max(counts)})))
    tokens = agent.tokens(agent.history([agent.longest]))[0]
    parts = [name for name in dict.fromkeys(tokens.part) if name in tokens.parts]
    each = ", ".join(parts) if len(parts) > 1 else "one token"
    fewer = f", which has no more of the {n} asked for" if len(decisions) < n else ""
    fewer += "; each counts as a task of its own" if decisions[0].task is None else ""
    agent.facts = {
        "Adapter": str(path),
        "Model": f"{model}: {counted(len(agent.layers), 'layer')} x {heads} "
        f"head{'s' * (heads != '1')}, {size:,} parameters{beside}",
        "Context length": f"{lengths} transition{'s' * (lengths != '1')}, "
        f"{counted(len(tokens), 'token')} at most; a transition is {each}; token {tokens.decides} "
        "decides; metrics are of whole transitions",
        "Device": str(device),
        "Samples": f"{counted(len(decisions), 'decision')} of the adapter{fewer}",
        **agent.rewarded,
    }
    agent.meta = {"n_heads": list(agent.n_heads), "model": model}
    agent.meta["rewarded_above"] = agent.rewarded_above
    return agent


def load_acting(
    path: str | Path | None, seed: int, device: torch.device, above: float | None = None
) -> "AdapterAgent":
    """The model of an adapter in its own environments; UserError if it lacks or misfits one."""
    agent = load(path, N_TRIED, seed, device, above, plays=True)
    agent.facts = {"Adapter": str(path), **agent.rewarded}
    agent.meta = {"adapter": str(path), "rewarded_above": agent.rewarded_above}
    return agent


class AdapterAgent(Agent):
    """An adapter's model and decisions; rewards `above` count as rewarded, None: as they say."""

    n_actions = 0  # that act() gives logits of; 0: not known yet

    def __init__(
        self, adapter: Adapter, n: int, seed: int, device: torch.device, above: float | None
    ) -> None:
        self.adapter, self.device = adapter, device
        with torch.random.fork_rng(devices=[]):
            seed_globals(0)  # an untrained model is the same in each process and run
            model = adapter.call("load")
        adapter.check(isinstance(model, nn.Module), "load()", "a torch.nn.Module", kind(model))
        with adapter.blamed(f"moving the model to {device}"):
            self.model = model.to(device).eval()
        decisions = read_decisions(adapter, n, seed)
        self.rewarded_above, told = read_rewarded(adapter, decisions[:N_TRIED], above)
        self.rewarded = {"Rewarded": told} if told else {}
        self.decisions = [replace(one, rewarded_above=self.rewarded_above) for one in decisions]
        self.room = self._read_room()
        self.longest = longest = max(range(len(decisions)), key=self.length)
        self.n_max = n_max = adapter.get("N_MAX", most := self.length(longest))
        expected = "a whole number, the transitions that the model can read"
        adapter.check(isinstance(n_max, int) and n_max > 0, "N_MAX", expected, repr(n_max))
        expected = f"at most N_MAX = {n_max} transitions"
        adapter.check(most <= n_max, f"samples()[{longest}]", expected, most)
        self.capture_options = self._read_capture_options()
        record, self.unseen = tried(self)
        self.sees_all = not self.unseen and all(record.calls.values())  # None: not chosen
        self.layers, self.n_heads = record.names, tuple(x.query_rows.shape[1] for x in record)
        self.title = f"{type(self.model).__name__} of {adapter.path.name}"

    def tell_doubts(self) -> None:
        """Say where modules mix tokens unseen, or logits are by chance."""
        if self.unseen:
            (name, kind_of), *others = self.unseen.items()
            more = f" and {len(others)} more" if others else ""
            note(
                f"{len(self.layers)} layers attend in sight; {name} (a {kind_of}){more} mixes "
                "tokens by no attention that can be read, and is missing in the results. If it "
                "attends, hand its weights in: historylens.record_attention(name, weights)"
            )
        one, same = self.act(self.history([0, 0])).double()
        if (one - same).abs().max() > 1e-3 * one.abs().max():
            note(
                "act() gives the same history twice other logits, as with dropout left on "
                "(model.train()): results will differ from run to run"
            )

    @torch.inference_mode()
    def act(self, history: History, positions: Tensor | None = None) -> Tensor:
        """Action logits `(B, A)` on any history that the model can read."""
        check, size = self.adapter.check, history.size
        name = "act()" if history.n else "act() on an empty history (n = 0)"
        expected = f"action logits of shape ({size}, A), A > 1, for {size} histories"
        with self.adapter.blamed(name):
            logits = self.adapter.module.act(self.model, history.copied())
            is_fit = isinstance(logits, Tensor) and logits.is_floating_point()
            is_fit = is_fit and logits.ndim == 2 and logits.shape[1] > 1
            check(is_fit and len(logits) == size, name, expected, kind(logits))
            check(logits.isfinite().all(), name, "finite logits", "some that are not")
            self.n_actions = self.n_actions or logits.shape[1]
            expected = f"logits of {self.n_actions} actions, as many as at first"
            check(logits.shape[1] == self.n_actions, name, expected, logits.shape[1])
        return logits.detach().as_subclass(Tensor)

    def tokens(self, history: History) -> list[Tokens]:
        """What each token of a batch of histories is; a map each."""
        if self.adapter.get("tokens") is None:
            return super().tokens(history)
        check, (n, size) = self.adapter.check, (history.n, history.size)
        maps = self.adapter.call("tokens", history.copied())
        maps = [maps] * size if isinstance(maps, Tokens) else maps
        is_fit = isinstance(maps, list | tuple) and len(maps) == size
        is_fit = is_fit and all(isinstance(one, Tokens) for one in maps)
        check(is_fit, "tokens()", f"a Tokens, or a list of one for each of {size}", kind(maps))
        expected = f"a map of {n} transitions, equally long for the whole batch"
        for one in maps:
            got = f"one of {one.n} transitions and {len(one)} tokens"
            check(one.n == n and len(one) == len(maps[0]), "tokens()", expected, got)
        return list(maps)

    def look_at(self, decisions: Sequence[Decision]) -> None:
        """Have other decisions; what they reach is of the room."""
        super().look_at(decisions)
        self.room = self._read_room()

    def position(self, states: np.ndarray) -> np.ndarray:
        """Cells `(..., 2)` int of states `(..., S)`; UserError: the adapter gives none for one."""
        flat = states.reshape(-1, states.shape[-1])
        distinct, places = np.unique(flat, axis=0, return_inverse=True)
        cells = np.empty((len(distinct), 2), dtype=np.int64)
        expected = f"a row and a column, whole numbers in 0..{MAX_SIDE - 1}"
        for i, state in enumerate(distinct):
            with self.adapter.blamed("position()"):
                cell = as_array(self.adapter.module.position(state), whole=True)
            is_fit = cell.dtype == np.int64 and cell.shape == (2,)
            is_fit = is_fit and cell.min() >= 0 and cell.max() < MAX_SIDE
            got = f"{cell.tolist()} for {state.tolist()}"
            self.adapter.check(is_fit, "position()", expected, got)
            cells[i] = cell
        return cells[places].reshape(*states.shape[:-1], 2)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the user's files, and of all parameters and buffers of the model."""
        weights = hashlib.sha256()
        for name, values in self.model.state_dict().items():
            weights.update(name.encode())
            if isinstance(values, Tensor):
                flat = values.detach().cpu().contiguous().flatten()
                weights.update(flat.view(torch.uint8).numpy())
        if self.environment is not None:
            self.environment.make(np.zeros(1, dtype=np.int64), [0])  # which may import more
        adapter = hashlib.sha256(b"".join(path.read_bytes() for path in self.adapter.files))
        return {"adapter": adapter.hexdigest(), "weights": weights.hexdigest()}

    def _read_room(self) -> tuple[int, int] | None:
        """Rows and columns: ROOM, or as many as samples reach; None without position()."""
        check, room = self.adapter.check, self.adapter.get("ROOM")
        if self.adapter.get("position") is None:
            check(room is None, "ROOM", "position(state) beside it", "none")
            return None
        names = ("states", "next_states", "query_state", "goal")
        known = (vars(one)[name] for one in self.decisions for name in names)  # of goals not all
        sizes = [self.position(x).reshape(-1, 2).max(0) + 1 for x in known if np.ndim(x) and len(x)]
        least = tuple(np.max(sizes, axis=0).tolist())
        room = least if room is None else room
        is_fit = isinstance(room, tuple | list) and [type(x) for x in room] == [int, int]
        is_fit = is_fit and all(a <= b <= MAX_SIDE for a, b in zip(least, room, strict=True))
        check(is_fit, "ROOM", f"(rows, columns) of at least {least}, as samples reach", repr(room))
        return tuple(room)

    def _read_capture_options(self) -> dict[str, Any]:
        check, options = self.adapter.check, self.adapter.get("CAPTURE", {})
        is_fit = isinstance(options, dict) and {*options} <= {"softmax", "heads"}
        check(is_fit, "CAPTURE", "a dict with softmax and heads", repr(options))
        if self.adapter.get("layers") is None:
            return dict(options)
        layers = self.adapter.call("layers", self.model)
        layers = [layers] if isinstance(layers, str) else layers
        is_fit = isinstance(layers, list | tuple | nn.ModuleList) and len(layers) > 0
        check(is_fit, "layers()", "a list of modules or their names", kind(layers))
        known = {module: name for name, module in self.model.named_modules()}
        for x in layers:
            is_known = isinstance(x, str) or (isinstance(x, nn.Module) and x in known)
            check(is_known, "layers()", "modules of the model", kind(x))
        return options | {"layers": [known.get(layer, layer) for layer in layers]}
