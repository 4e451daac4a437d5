"""Read a file of the user's code that says how to run a model.

    python visualize_attention.py --adapter my_model.py

It defines the functions of `SIGNATURES`; README.md has a complete one, `examples/` has four.
What goes wrong in it is told in one line with the place in the file; with ADAPTER_TRACEBACK=1 in
the environment, the whole traceback as well.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from historylens.capture import CaptureError
from historylens.common.batches import is_out_of_memory
from historylens.common.errors import UserError, note
from historylens.history import Decision, History
from historylens.tokens import Tokens

REQUIRED = ("load", "samples", "act")
SIGNATURES = {
    "load": "load() -> nn.Module",
    "samples": "samples(n, seed) -> list[Decision]",
    "act": "act(model, history) -> action logits (B, A)",
    "tokens": "tokens(history) -> Tokens",  # else a token a transition, and the query last
    "layers": "layers(model) -> list of modules or their names",  # else all that attend
    "make_env": "make_env(goals) -> gymnasium.vector.VectorEnv",  # for a comparison
}
TRACEBACK = "ADAPTER_TRACEBACK"
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Adapter:
    """A file of the user's code, read. What is called in it goes through `call`.

    Attributes:
        path: the file, as it was named.
        module: its content.
    """

    path: Path
    module: ModuleType

    def get(self, name: str, default: Any = None) -> Any:
        """What the file defines under a name."""
        return vars(self.module).get(name, default)

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the file; what it raises is told in one line."""
        with self.blamed(f"{name}()"):
            return self.get(name)(*args)

    @contextlib.contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """A block that runs the user's code: what it raises is told in one line.

        Lack of memory passes, so that the batch can be halved.
        """
        try:
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

    Its folder stays first on `sys.path`.

    Raises:
        UserError: there is no such file, it is no Python, it raises, or a function is missing.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {what}: expected --adapter to name a Python file")
    if path.suffix != ".py":
        raise UserError(f"{path}: expected --adapter to name a Python file (.py)")
    name = "adapter" if path.stem == "adapter" else "adapter_of_user"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = importlib.util.module_from_spec(spec)
    if name == "adapter":
        module.__getattr__ = _once_of_adapter  # its `from adapter import` finds itself
    _put_first(path.resolve().parent)
    adapter = Adapter(path, module)
    with adapter.blamed("importing it"):
        sys.modules[name] = module  # dataclasses and pickle look it up
        spec.loader.exec_module(module)
    for name, signature in SIGNATURES.items():
        value = adapter.get(name)
        if value is None and name in REQUIRED:
            there = [f"{n}()" for n in SIGNATURES if adapter.get(n) is not None]
            near = f"; it defines {', '.join(there)}" if there else ""
            raise UserError(f"{path}: no {name}(): expected `def {signature}`{near}")
        if value is not None and not callable(value):
            raise adapter.wrong(name, f"a function {signature}", kind(value))
    return adapter


def kind(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None:
        return "nothing (None)"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _put_first(folder: Path) -> None:
    """Let the user's code import what lies beside it, and nothing that lies beside our commands.

    Their `model`, wherever it lies, would otherwise be ours.
    """
    main, ours = vars(sys.modules["__main__"]), PACKAGE.parent
    if Path(main.get("__file__", "")).resolve().parent == ours == Path(sys.path[0]).resolve():
        del sys.path[0]
        del main["__file__"]  # processes that the user's code spawns would import our command
    sys.path.insert(0, str(folder))
    if _OLD_IMPORT not in sys.meta_path:
        sys.meta_path.append(_OLD_IMPORT)  # at the end: asked where the user has no such module


class _OldImport:
    """Finds a module `adapter`, from which adapters once imported their names."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "adapter" else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # the usual

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _once_of_adapter


_OLD_IMPORT = _OldImport()


def _once_of_adapter(name: str) -> type:
    """A module's `__getattr__`: names that `from adapter import ...` gave."""
    for known in (Decision, History, Tokens):
        if name == known.__name__:
            _tell_new_import()
            return known
    raise AttributeError(f"module 'adapter' has no attribute {name!r}")


@functools.cache
def _tell_new_import() -> None:
    note("`from adapter import Decision, Tokens` is now `from historylens import Decision, Tokens`")


def _told(error: BaseException, path: Path) -> str:
    """What an exception says, and where in the user's code it was raised, on one line."""
    if isinstance(error, CaptureError):
        return (
            f"cannot be looked into: {error}; in this file, layers(model) chooses layers, and "
            "CAPTURE = {...} gives capture's arguments softmax and heads"
        )
    said = " ".join(str(error).split())
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        said, place = f"SyntaxError: {error.msg}", f"{_short(error.filename)}:{error.lineno}"
    else:
        place = _place(error, path)
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"; `pip install {error.name.partition('.')[0]}`, or put it beside the file"
    more = "" if os.environ.get(TRACEBACK) else f"; {TRACEBACK}=1 shows the traceback"
    return f"raised {said} ({place}){hint}{more}"


def _place(error: BaseException, path: Path) -> str:
    """`file:line` of the innermost line of the user's code."""
    own = path.resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        is_beside = own.parent in file.parents and "site-packages" not in file.parts
        if file == own or (is_beside and PACKAGE not in file.parents):
            return f"{_short(frame.filename)}:{frame.lineno}"
    return str(path)  # the call itself does not fit, for example its arguments


def _short(file: str) -> str:
    """A file's path from here, where it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
