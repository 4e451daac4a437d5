"""What several test modules share: one thread, a tiny model, tiny histories."""

import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too

import hypothesis
import numpy as np
import pytest
import torch

from ad.darkroom import N_ACTIONS, DarkRoom
from config import ModelConfig
from dataset import Histories
from historylens.common.errors import run_command
from model import ADTransformer

torch.set_num_threads(1)
for number in (signal.SIGINT, signal.SIGHUP):  # heard, also where these tests run under nohup
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)
hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


class PlainRoom:
    """One room in plain python: the slow twin."""

    def __init__(self, goal, size, horizon, env="darkroom"):
        self.goal, self.size, self.horizon, self.env = tuple(goal), size, horizon, env

    def reset(self, start=None):
        self.t, self.has_key, self.is_done = 0, False, False
        self.cell = tuple(start) if start is not None else (self.size // 2, self.size // 2)
        return self.cell

    def reward(self):
        """The rules of each task in turn, as the paper states them."""
        if self.env == "darkroom":
            return int(self.cell == self.goal)
        if self.is_done:
            return 0
        if self.env == "darkroom-hard":
            self.is_done = self.cell == self.goal
            return int(self.is_done)
        key, door = self.goal[:2], self.goal[2:]
        if not self.has_key:
            self.has_key = self.cell == key
            return int(self.has_key)
        self.is_done = self.cell == door
        return int(self.is_done)

    def step(self, action):
        move = [(1, 0), (-1, 0), (0, 1), (0, -1), (0, 0)][action]
        row, col = (min(max(x + d, 0), self.size - 1) for x, d in zip(self.cell, move, strict=True))
        self.cell = (row, col)
        self.t += 1
        return self.cell, self.reward(), self.t == self.horizon


def make_histories(
    goals=((0, 1), (2, 2), (4, 3)), n_episodes=6, horizon=5, grid_size=5, seed=0
) -> Histories:
    """Histories of random play in a real room, one a goal."""
    room = DarkRoom(np.array(goals), grid_size, horizon)
    rng = np.random.default_rng(seed)
    states = room.reset()
    steps = []
    for _ in range(n_episodes * horizon):
        actions = rng.integers(N_ACTIONS, size=room.n_rooms)
        next_states, rewards, done = room.step(actions)
        steps.append((states, actions, rewards, next_states))
        states = room.reset() if done else next_states
    parts = (np.stack(part, axis=1).astype(np.int8) for part in zip(*steps, strict=True))
    return Histories(*parts, room.goals, horizon)


def random_window(config: ModelConfig, n_samples: int, n: int, seed: int = 0):
    """Context of `n` random transitions and `n + 1` random query states: what a model reads."""
    rng, size = np.random.default_rng(seed), config.grid_size

    def draw(high, *shape):
        return torch.from_numpy(rng.integers(high, size=(n_samples, *shape)))

    context = draw(size, n, 2), draw(config.num_actions, n), draw(2, n), draw(size, n, 2)
    return context, draw(size, n + 1, 2)


def sharp_model(config: ModelConfig, seed: int = 0, dtype=torch.float32) -> ADTransformer:
    """A model in evaluation mode, of which every weight matters to its output."""
    torch.manual_seed(seed)
    model = ADTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Twelve positions, two layers of two heads, a room of 5 x 5."""
    return ModelConfig(
        n_transit=12, tf_n_layer=2, tf_n_head=2, tf_n_embd=16, tf_n_inner=24, grid_size=5
    )


@pytest.fixture
def tiny_model(tiny_config) -> ADTransformer:
    return sharp_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_histories() -> Histories:
    return make_histories()


def refused(main, argv, capsys) -> str:
    """The one line, without its newline, with which a command refuses, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(part) for part in argv]))
    said = capsys.readouterr().err.split("\r")[-1]  # a progress bar may stand before it
    assert end.value.code == 2
    assert said.count("\n") == 1, said
    assert said.startswith("error: ")
    return said.strip()


def files_of(folder: Path) -> dict[str, bytes]:
    """Names, from the folder on, and contents of all files in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_checkpoint(path, model: ADTransformer, goals=None, step=5, **config) -> Path:
    """A checkpoint file as training writes it; further settings go into its config."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "step": step,
        "config": {**vars(model.config), "env": "darkroom", "horizon": 5, **config},
        "model": model.state_dict(),
        "optimizer": None,
        "lr_sched": None,
        "goals": {"train": [], "validation": [], "test": goals or []},
    }
    torch.save(content, path)
    return path


def n_hooks(model: torch.nn.Module) -> int:
    """Hooks on the modules of a model, and global ones."""
    from torch.nn.modules import module as hooks

    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    own = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return own + len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks)


def ad_agent(model: ADTransformer, histories: Histories, places=()):
    """An AD model as an agent, and the decisions `(history, step, stride)` of histories."""
    from ad.agent import ADAgent
    from ad.checkpoints import Checkpoint
    from ad.decisions import HistoryDecisions, Place

    checkpoint = Checkpoint(Path("ckpt-5.pt"), 5, {}, model, {})
    places = [Place(*place) for place in places]
    decisions = HistoryDecisions(histories, places, model.n_context_max)
    return ADAgent(checkpoint, torch.device("cpu"), decisions)
