"""Bring your own model: read and check a file of your code that says how to run it.

    python visualize_attention.py --adapter my_model.py

The file defines these functions; README.md has a complete one, `examples/` has four:

    load() -> nn.Module                         your model with its weights
    samples(n, seed) -> list[Decision]          n decisions, each with the transitions before it
    act(model, history) -> (B, A) logits        run it on a batch of equally long histories
    tokens(history) -> Tokens                   what each token that it reads is; not needed where
                                                there is one a transition, and the query last
    layers(model) -> list of modules or names   not needed where they are found
    make_env(goals) -> gymnasium VectorEnv      for compare_compression.py, with GOALS and HORIZON

What goes wrong in it is told in one line with the place in the file; with ADAPTER_TRACEBACK=1 in
the environment, the whole traceback as well.
"""

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from analysis import is_out_of_memory
from attention.calls import CaptureError
from attention.tokens import Tokens
from compression import History
from config import UserError

__all__ = ["Adapter", "Decision", "History", "Tokens", "load_adapter"]

REQUIRED = ("load", "samples", "act")
OPTIONAL = ("tokens", "layers", "make_env")
SIGNATURES = {
    "load": "load() -> nn.Module",
    "samples": "samples(n, seed) -> list[Decision]",
    "act": "act(model, history) -> action logits (B, A)",
    "tokens": "tokens(history) -> Tokens",
    "layers": "layers(model) -> list of modules or their names",
    "make_env": "make_env(goals) -> gymnasium.vector.VectorEnv",
}
_CAPTURE = (
    "layers(model) chooses layers, and CAPTURE = {...} gives capture's arguments softmax and heads"
)
TRACEBACK = "ADAPTER_TRACEBACK"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Decision:
    """A state in which a model acts, and the `n` transitions before it in the order of time.

    Arrays, tensors and lists are accepted. Whatever else a transition holds (an image, flattened;
    a continuous action) may be columns of its state.

    Attributes:
        states: `(n,)` or `(n, S)`, the state before each transition.
        actions: `(n,)` int.
        rewards: `(n,)`; above 0 counts as rewarded.
        query_state: a number or `(S,)`, the state to act in.
        next_states: as `states`; None: the state of the transition that follows.
        episodes: `(n,)` int, number of the episode of each transition, never falling; None: one.
        title: says which decision this is, in the titles of pictures.
        labels: columns of metrics.csv that name it.
        task: number of the task, for comparisons between decisions of different tasks.
    """

    states: Any
    actions: Any
    rewards: Any
    query_state: Any
    next_states: Any = None
    episodes: Any = None
    title: str = ""
    labels: dict[str, int | float | str] = field(default_factory=dict)
    task: int | None = None

    @property
    def n(self) -> int:
        """Transitions before the decision."""
        return len(self.rewards)


@dataclass(frozen=True)
class Adapter:
    """A file of the user's code, read. What is called in it goes through `call`.

    Attributes:
        path: the file, as it was named.
        module: its content.
        theirs: modules of the user that bear the names of modules here.
    """

    path: Path
    module: ModuleType
    theirs: dict[str, ModuleType] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the file defines a name."""
        return getattr(self.module, name, None) is not None

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the file.

        Raises:
            UserError: it raised; one line that says what and where.
        """
        with self.blamed(f"{name}()"):
            return getattr(self.module, name)(*args)

    @contextlib.contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """A block that runs the user's code: what it raises is told in one line.

        Lack of memory passes, so that the batch can be halved.
        """
        try:
            with _their_modules(self.path, self.theirs):
                yield
        except (Exception, SystemExit) as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            raise UserError(f"{self.path}: {what} {_told(error, self.path)}") from error

    def wrong(self, name: str, expected: str, got: str) -> UserError:
        """An error that says what a function should have given."""
        return UserError(f"{self.path}: {name}: expected {expected}, got {got}")


def load_adapter(path: str | Path) -> Adapter:
    """Run the file and check that it defines what it must.

    Raises:
        UserError: there is no such file, it is no Python, it raises, or a function is missing.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {what}: expected --adapter to name a Python file")
    if path.suffix != ".py":
        raise UserError(f"{path}: expected --adapter to name a Python file (.py)")
    spec = importlib.util.spec_from_file_location("adapter_of_user", path.resolve())
    adapter = Adapter(path, importlib.util.module_from_spec(spec))
    with adapter.blamed("importing it"):
        sys.modules[spec.name] = adapter.module  # dataclasses and pickle look it up
        spec.loader.exec_module(adapter.module)
    for name in (*REQUIRED, *OPTIONAL):
        value = getattr(adapter.module, name, None)
        if value is None and name in REQUIRED:
            raise UserError(
                f"{path}: no {name}(): expected `def {SIGNATURES[name]}`{_near(adapter)}"
            )
        if value is not None and not callable(value):
            raise adapter.wrong(name, f"a function {SIGNATURES[name]}", kind(value))
    return adapter


def _near(adapter: Adapter) -> str:
    """Which of the functions a file does define, in words."""
    there = [name for name in (*REQUIRED, *OPTIONAL) if adapter.has(name)]
    return f"; it defines {', '.join(f'{n}()' for n in there)}" if there else ""


def kind(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None:
        return "nothing (None)"
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"{type(value).__name__} {tuple(shape)} of {value.dtype}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _told(error: BaseException, path: Path) -> str:
    """What an exception says, and where in the user's code it was raised, on one line."""
    if isinstance(error, CaptureError):
        return f"cannot be looked into: {error}; in this file, {_CAPTURE}"
    said = " ".join(str(error).split())
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        said = f"SyntaxError: {error.msg}"
        place = f"{_short(error.filename)}:{error.lineno}"
    else:
        place = _place(error, path)
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"; `pip install {error.name.partition('.')[0]}`, or put it beside the file"
    return f"raised {said} ({place}){hint}" + (
        "" if os.environ.get(TRACEBACK) else f"; {TRACEBACK}=1 shows the traceback"
    )


def _place(error: BaseException, path: Path) -> str:
    """`file:line` of the innermost line of the user's code."""
    own = path.resolve()
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if _is_theirs(Path(frame.filename), own)]
    if not theirs:  # the call itself does not fit, for example its arguments
        return str(path)
    return f"{_short(theirs[-1].filename)}:{theirs[-1].lineno}"


def _is_theirs(file: Path, own: Path) -> bool:
    if file == own:
        return True
    is_ours = file.parent == ROOT or (file.parent / "__init__.py" in ROOT.glob("*/__init__.py"))
    return own.parent in file.parents and "site-packages" not in file.parts and not is_ours


def _short(file: str) -> str:
    """A file's path from here, where it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextlib.contextmanager
def _their_modules(path: Path, theirs: dict[str, ModuleType]) -> Iterator[None]:
    """Let the user's code import what lies beside it, also where its name is one of ours.

    Their `model.py` or `config.py` would otherwise be ours. `adapter` always is ours.
    """
    folder = path.resolve().parent
    names = _shared_names(folder) - {path.stem}
    ours = _taken_out(names)
    sys.modules.update(theirs)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        theirs.update(_taken_out(names))
        sys.modules.update(ours)


def _taken_out(names: Set[str]) -> dict[str, ModuleType]:
    """Modules of these names and what lies in them, removed from those that are imported."""
    if not names:
        return {}
    found = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in names}
    for name in found:
        del sys.modules[name]
    return found


@lru_cache(maxsize=4)
def _shared_names(folder: Path) -> frozenset[str]:
    """Names that can be imported from there and from here alike."""
    if folder == ROOT:
        return frozenset()
    return frozenset(_names_in(ROOT) & _names_in(folder) - {"adapter"})


def _names_in(folder: Path) -> set[str]:
    """Names under which the content of a folder can be imported."""
    files = {entry.stem for entry in folder.glob("*.py")}
    return files | {entry.parent.name for entry in folder.glob("*/__init__.py")}
