"""What several test modules share: one thread, a tiny model, tiny histories."""

import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too

import hypothesis
import numpy as np
import pytest
import torch

from ad.checkpoints import HISTORIES_NAME
from ad.darkroom import N_ACTIONS, DarkRoom
from config import ModelConfig
from dataset import Histories
from historylens.common.errors import run_command
from historylens.common.files import write_atomically
from historylens.comparison import intervals
from model import ADTransformer

torch.set_num_threads(1)
torch.testing._comparison._HAS_DTENSOR = False  # their import takes seconds
for number in (signal.SIGINT, signal.SIGHUP):  # heard, also where these tests run under nohup
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)
hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


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


@pytest.fixture(scope="module")
def few_effects():
    """Few decisions of what costs most, where the effects of heads and sets are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("historylens.effects.guide.MAX_TOKENS_SETS", 5_000)
        for limit, n in (("N_EXCHANGED", 4), ("N_HIDDEN", 4), ("N_HIDDEN_BY_LAYER", 2)):
            patch.setattr(f"historylens.effects.inside.{limit}", n)
        yield


def draw_quickly(path, *_, **__):
    """Stands for a picture."""
    write_atomically(path, f"picture {path.name}".encode())


def without_drawing(patch):
    """Pictures are a few bytes each."""
    from historylens.pictures.painter import Painter

    draw = Painter.draw
    patch.setattr(Painter, "draw", lambda self, _, path, *a, **k: draw(self, draw_quickly, path))
    patch.setattr("ad.evaluation.draw_learning_curve", lambda _, path: draw_quickly(path))


@pytest.fixture
def few_resamples(monkeypatch):
    """A tenth of the resamples of an interval, for tests of thousands of them."""
    monkeypatch.setattr(intervals, "N_RESAMPLES", 1000)
    intervals._resamples.cache_clear()
    yield
    intervals._resamples.cache_clear()


@pytest.fixture
def undrawn(monkeypatch):
    """So are they, written by this process, for tests that do not look at them."""
    without_drawing(monkeypatch)
    monkeypatch.setattr("historylens.pictures.painter.MIN_PICTURES", 10**6)


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


def run_in_two(main, argv, prepare=lambda rank: None):
    """Run a command as two forked processes that share its work, each prepared for its rank."""
    options = {"nprocs": 2, "start_method": "fork"}
    torch.multiprocessing.start_processes(_run_one_of_two, (main, argv, prepare), **options)


def _run_one_of_two(rank, main, argv, prepare):
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{20_000 + os.getppid() % 10_000}"}
    torch.cuda.is_available = lambda: False  # what is forked cannot use it
    prepare(rank)
    main(argv)


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


@pytest.fixture
def run_file(tmp_path, tiny_model) -> Path:
    """A checkpoint of two test goals as other code writes it, no digest; histories beside it."""
    make_histories().save(tmp_path / HISTORIES_NAME)
    return write_checkpoint(tmp_path / "ckpt-5.pt", tiny_model, [[4, 4], [0, 3]])


def n_hooks(model: torch.nn.Module) -> int:
    """Hooks on the modules of a model, and global ones."""
    from torch.nn.modules import module as hooks

    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    own = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return own + sum(len(x) for name, x in vars(hooks).items() if name.startswith("_global_") and x)


def ad_agent(model: ADTransformer, histories: Histories, places=()):
    """An AD model as an agent, and the decisions `(history, step, stride)` of histories."""
    from ad.agent import ADAgent
    from ad.checkpoints import Checkpoint
    from ad.decisions import HistoryDecisions, Place

    checkpoint = Checkpoint(Path("ckpt-5.pt"), 5, {}, model, {})
    places = [Place(*place) for place in places]
    decisions = HistoryDecisions(histories, places, model.n_context_max)
    return ADAgent(checkpoint, torch.device("cpu"), decisions)
