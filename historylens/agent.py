"""What decides: an `Agent`, the AD model or an adapter's; analysis and comparison know no other."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from historylens.capture import LayerAttention, capture
from historylens.capture.heads import Change, HeadOutput, heads
from historylens.common.batches import MAX_TOKENS_ACTING, MAX_WEIGHTS
from historylens.common.errors import UserError
from historylens.common.text import counted
from historylens.history import LOOKS, Decision, History, HistoryBuffer
from historylens.tokens import NONE, PADDING, Tokens, sum_rows

N_LAST_ROWS = 8  # transitions whose attention rows are in last_rows
WHOLE = {"received", "last_rows"}  # fields of a History that whole maps are looked at for


class Unreadable(UserError):
    """A model does not show what a strategy looks at."""


@dataclass(frozen=True)
class Environment:
    """Tasks that an agent can be put to.

    `make` gives rooms of tasks `(B,)` int that step together, where chance depends on seeds `(B,)`,
    which follow each other. `reset()`, also after every `horizon` steps, begins an episode in all
    and gives states `(B, S)`. `step(actions)` gives the states reached, rewards `(B,)`, and whether
    an episode is over, `(B,)` or one for all; `states` are to act in next, of one begun anew.
    """

    goals: tuple[str, ...]  # names of the tasks, by number
    horizon: int  # steps an episode
    make: Callable[[np.ndarray, Sequence[int]], Any]
    best: tuple[float, ...] | None = None  # best possible return an episode of each task
    named: tuple[str, str] = ("task", "of make_env()")  # what one is called, and which they are
    goal_states: np.ndarray | None = None  # (G, S), or (G, m, S) in this order: goals, if known

    def __str__(self) -> str:
        return f"{counted(len(self.goals), self.named[0])} {self.named[1]}"


class Agent(ABC):
    """A model in evaluation mode, and decisions that it makes after some history."""

    model: nn.Module
    device: torch.device
    decisions: Sequence[Decision]  # what to look at; may be empty
    n_max: int  # transitions that the model can read at once
    layers: Sequence[str]  # names of what attends, in the order in which it runs
    n_heads: Sequence[int]  # heads of each layer
    sees_all: bool = True  # whether nothing but these layers mixes tokens, as far as is known
    capture_options: Mapping[str, Any] = {}  # further arguments of capture
    environment: Environment | None = None  # where it can act
    reads_inputs_alone: bool = False  # whether of a history only its `inputs` count
    can_place: bool = False  # whether act() follows the positions that it is given
    rewarded_above: float = 0.0  # rewards above it count as rewarded, as in its decisions
    room: tuple[int, int] | None = None  # rows and columns, where states are cells of a grid
    title: str  # the model, and the environment, in a few words
    identity: Mapping[str, Any]  # plain values on which results depend, such as a digest
    facts: Mapping[str, str]  # name -> what was loaded, in words
    meta: Mapping[str, Any]  # the same as plain values

    @abstractmethod
    def act(self, history: History, positions: Tensor | None = None) -> Tensor:
        """Action logits `(B, A)` on up to `n_max` transitions, without padding.

        `positions` `(B, n + 1)` int64, if it `can_place`: where each and, last, the query stands.
        """

    def forward(self, history: History) -> Tensor:
        """The model's own forward pass, whose attention is captured: action logits `(B, A)`."""
        return self.act(history)

    def tokens(self, history: History) -> list[Tokens]:
        """What each token is that the model reads, a map each of the `B` histories."""
        return [Tokens.of(history.n)] * history.size

    def position(self, states: np.ndarray) -> np.ndarray:
        """Row and column `(..., 2)` int of the cell that states `(..., S)` are, in a `room`."""
        return states[..., :2]

    def length(self, index: int) -> int:
        """Transitions before a decision; equally long ones can share a pass."""
        return self.decisions[index].n

    def look_at(self, decisions: Sequence[Decision]) -> None:
        """Have other decisions, such as those of own play."""
        self.decisions = decisions

    def history(self, indices: Sequence[int]) -> History:
        """What lies before some equally long decisions, on the model's device."""
        return History.of([self.decisions[i] for i in indices], self.device)

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest decision."""
        longest = max(range(len(self.decisions)), key=self.length)
        return len(self.tokens(self.history([longest]))[0])


@torch.inference_mode()
def attend(
    agent: Agent, history: History, layers: Sequence[int] | None = None, **options: Any
) -> tuple[Tensor, list[LayerAttention]]:
    """One forward pass on a history without padding: action logits `(B, A)`, and the attention.

    `layers`: numbers of those to capture, None: all; `options`, and CaptureError: as of `capture`.
    """
    names = [agent.layers[i] for i in (range(len(agent.layers)) if layers is None else layers)]
    told = {**agent.capture_options, **where_of(agent.tokens(history))}
    if not any("#" in name for name in names):  # several calls of one module are told by number
        told["layers"] = names
    with capture(agent.model, **{"received": False, **options, **told}) as record:
        logits = agent.forward(history)
    by_name = {layer.name: layer for layer in record}
    return logits, [by_name[name] for name in names]


def where_of(tokens: Sequence[Tokens]) -> dict[str, Any]:
    """Arguments of capture that say which token decides and which are padding, where it matters."""
    told: dict[str, Any] = {}
    if any(one.decides != len(one) - 1 for one in tokens):
        told["query"] = torch.tensor([one.decides for one in tokens])
    if any(PADDING in one.part for one in tokens):
        told["padding"] = torch.tensor([[p == PADDING for p in one.part] for one in tokens])
    return told


@torch.inference_mode()
def run_heads(
    agent: Agent,
    history: History,
    change: Mapping[int, Change] | None = None,
    hide: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, dict[int, HeadOutput]]:
    """One forward pass with heads told apart: action logits `(B, A)`, and layers by their number.

    `change` and `hide` as of `historylens.capture.heads`, by the number of a layer. A layer whose
    heads cannot be told apart, or that reads its tokens in several passes, is missing.
    """
    tokens, names = agent.tokens(history), agent.layers
    options = {**agent.capture_options, **where_of(tokens)}
    options["change"] = {names[i]: value for i, value in (change or {}).items()}
    options["hide"] = {names[i]: value for i, value in (hide or {}).items()}
    with heads(agent.model, **options) as seen:
        logits = agent.forward(history)
    layers = {i: seen[name] for i, name in enumerate(names) if name in seen}
    return logits, {i: x for i, x in layers.items() if x.output.shape[2] == len(tokens[0])}


def look(agent: Agent, history: History, wanted: Collection[str]) -> History:
    """The history with `wanted` fields of `LOOKS`: attention averaged over layers and heads.

    Columns of a transition's tokens are summed, rows averaged. Unreadable: one is not shown.
    """
    wanted = [name for name in LOOKS if name in wanted]
    if not wanted:
        return history
    size = history.size
    if WHOLE & {*wanted}:
        n_tokens = len(agent.tokens(history.rows(slice(0, 1)))[0])
        size = max(1, MAX_WEIGHTS // (n_tokens**2 * sum(agent.n_heads)))
    parts = [history.rows(slice(i, i + size)) for i in range(0, history.size, size)]
    looks = [_look(agent, part, {*wanted}) for part in parts]
    found = {name: torch.cat([one[name] for one in looks]) for name in wanted}
    return replace(history, **{k: x.float().to(history.device) for k, x in found.items()})


def _look(agent: Agent, history: History, wanted: set[str]) -> dict[str, Tensor]:
    """What one pass shows of attention; a second is for whole maps beside heads told apart."""
    tokens, known, layers, is_whole = agent.tokens(history), {}, [], bool(WHOLE & wanted)
    if {"norm", "contribution"} & wanted:
        layers = [*run_heads(agent, history)[1].values()]
        shares = [layer.shares() for layer in layers if layer.projection is not None]
        what = "expected heads side by side before a linear projection, as contributions take"
        if not shares:
            raise Unreadable(f"{agent.title}: {what}, got none")
        for name, values in zip(("norm", "contribution"), zip(*shares, strict=True), strict=True):
            mean = torch.stack(values).mean(0).cpu().numpy()  # (B, T)
            known[name] = torch.from_numpy(sum_rows(mean, tokens)[:, :-1])
    if not is_whole and not {"query_attention", "head_attention"} & wanted:
        return known
    if is_whole or len(layers) < len(agent.layers):
        maps = {"maps": range(history.size), "map_size": max(8, len(tokens[0]))}
        _, layers = attend(agent, history, **(maps if is_whole else {}))
    if is_whole and any(layer.maps.shape[2] < len(tokens[0]) for layer in layers):
        what = "expected layers where every token attends, got one where only the query does"
        raise Unreadable(f"{agent.title}: {what}")
    by_head = [torch.from_numpy(sum_rows(layer.query_rows, tokens)[..., :-1]) for layer in layers]
    most = max(agent.n_heads)  # by_head: (B, H, n) float64
    padded = [functional.pad(x, (0, 0, 0, most - x.shape[1]), value=np.nan) for x in by_head]
    known["head_attention"] = torch.stack(padded, 1)
    known["query_attention"] = torch.stack([x.mean(1) for x in by_head]).mean(0)
    if is_whole:
        weights = sum(layer.maps.nan_to_num().double().mean(1) for layer in layers)
        columns = sum_rows(weights.numpy() / len(layers), tokens)[..., :-1]  # (B, T, n)
        among = sum_rows(columns.swapaxes(1, 2), tokens)[..., :-1].swapaxes(1, 2)  # (B, n, n)
        counts = [np.bincount(one.transition[one.transition != NONE]) for one in tokens]
        among = torch.from_numpy(among / np.stack(counts)[:, :, None])
        known |= {"received": among.sum(1), "last_rows": among[:, -N_LAST_ROWS:]}
    return known


@torch.inference_mode()
def act_in_parts(agent: Agent, history: History, positions: Tensor | None = None) -> Tensor:
    """`Agent.act` on histories of any lengths, padded in front; a pass for every length."""
    size = max(1, MAX_TOKENS_ACTING // (history.n + 1))
    logits, order = [], []
    for some in torch.arange(history.size, device=history.device).split(size):
        chosen = history if len(some) == history.size else history.rows(some)
        for own, part in chosen.by_count():
            placed = None if positions is None else positions[some[own], -part.n - 1 :]
            logits.append(agent.act(part, placed))
            order.append(some[own])
    return torch.cat(logits)[torch.cat(order).argsort()]


def seed_globals(number: int) -> None:
    """Seed the generators of a process that code of a user's may draw from."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def rollout(
    rooms: Any,
    policy: Any,
    n_steps: int,
    noises: Sequence[np.random.Generator],
    bar: tqdm | None = None,
    tasks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Act in `B` rooms of `Environment.make`: rewards, and where an episode ended, `(B, n_steps)`.

    `policy.act(buffer, query_states)` gives action logits `(B, A)` on what the rooms have been
    through, in states `(B, S)`; all of that lies on its `device`. `noises`: generators of the
    action noise, one a room; `tasks` `(B,)` are equal where two rooms are of the same task.
    """

    def tensor(values: np.ndarray) -> Tensor:  # a copy: environments may use their arrays again
        return torch.tensor(np.asarray(values), device=policy.device)

    states = tensor(rooms.reset())
    buffer = HistoryBuffer(states, n_steps, tasks)
    rewards, ends = [], np.zeros((len(states), n_steps), dtype=bool)
    for t in range(n_steps):
        logits = policy.act(buffer, states)  # (B, A)
        if t == 0:
            noise = np.stack([rng.gumbel(size=(n_steps, logits.shape[1])) for rng in noises])
        # The largest of logits and Gumbel noise is a draw from their softmax.
        actions = (logits.double().cpu().numpy() + noise[:, t]).argmax(axis=1)
        reached, earned, ended = rooms.step(actions)
        rewards.append(np.array(earned))
        is_cut = (t + 1) % rooms.horizon == 0
        ends[:, t] = is_cut | np.asarray(ended)
        buffer.append(states, *map(tensor, (actions, earned, reached)), done=tensor(ends[:, t]))
        states = tensor(rooms.reset() if is_cut else rooms.states)
        if bar is not None:
            bar.update(len(states))
    return np.stack(rewards, axis=1) if rewards else np.zeros(ends.shape, dtype=np.int64), ends


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto`: a GPU where there is one. UserError: it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # of "meta" there is none
    except Exception as error:  # torch raises a different type for each missing backend
        what = f"expected a --device of this machine (cpu, cuda, cuda:1, ...), got {name!r}"
        raise UserError(f"{what}, which is not there") from error
    return device
