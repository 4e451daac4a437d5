"""A file of the user's code that says how to run a model: it defines functions of `SIGNATURES`."""

import contextlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from historylens.capture import CaptureError
from historylens.common.errors import UserError, expect, is_out_of_memory, note, told
from historylens.history import Decision, History
from historylens.tokens import Tokens

SIGNATURES = {
    "load": "load() -> nn.Module",
    "samples": "samples(n, seed) -> list[Decision]",
    "act": "act(model, history) -> action logits (B, A)",
    "tokens": "tokens(history) -> Tokens",  # else a token a transition, and the query last
    "layers": "layers(model) -> list of modules or their names",  # else all that attend
    "position": "position(state) -> (row, column)",  # for a map of the room
    "make_env": "make_env(goals) -> gymnasium.vector.VectorEnv",  # for a comparison
}
TRACEBACK = "ADAPTER_TRACEBACK"  # set, what goes wrong in the file is told with its traceback
LIBRARIES = [Path(sysconfig.get_paths()[x]).resolve() for x in ("stdlib", "purelib", "platlib")]
PACKAGE = Path(__file__).resolve().parents[1]


class Adapter:
    """A file, run and checked; its folder stays first on `sys.path`. UserError: it does not fit."""

    def __init__(self, path: str | Path | None) -> None:
        what = "expected --adapter FILE, a Python file that says how to run your model"
        expect(path is not None, what)
        self.path, self._folder = (path := Path(path)), os.curdir  # whereto its code went
        what = "is a folder" if path.is_dir() else "there is no such file"
        expect(path.is_file(), f"{path}: {what}: expected --adapter to name a Python file")
        expect(path.suffix == ".py", f"{path}: expected --adapter to name a Python file (.py)")
        name = "adapter" if path.stem == "adapter" else "adapter_of_user"
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        self.module = importlib.util.module_from_spec(spec)
        if name == "adapter":
            self.module.__getattr__ = _once_of_adapter  # its `from adapter import` finds itself
        self._known = {*sys.modules}
        _put_first(path.resolve().parent)
        with self.blamed("importing it"):
            sys.modules[name] = self.module  # dataclasses and pickle look it up
            spec.loader.exec_module(self.module)
        defined = [name for name in SIGNATURES if self.get(name) is not None]
        near = f"; it defines {', '.join(f'{name}()' for name in defined)}" if defined else ""
        for name, form in SIGNATURES.items():
            value = self.get(name)
            missing = f"{path}: no {name}(): expected `def {form}`{near}"
            expect(value is not None or name not in ("load", "samples", "act"), missing)
            self.check(value is None or callable(value), name, f"a function {form}", kind(value))

    @property
    def files(self) -> list[Path]:
        """The file, and all that has been imported from beside it, or by it, but for libraries."""
        loaded = {x: getattr(one, "__dict__", {}).get("__file__") for x, one in sys.modules.items()}
        paths = {Path(file).resolve(): x for x, file in loaded.items() if isinstance(file, str)}
        adapter, old = self.path.resolve(), self._known
        own = [path for path, x in paths.items() if _is_users(path, adapter, x not in old)]
        return sorted(path for path in own if path.is_file())

    def get(self, name: str, default: Any = None) -> Any:
        """What the file defines under a name."""
        return vars(self.module).get(name, default)

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the file; what it raises is told in one line."""
        with self.blamed(f"{name}()"):
            return self.get(name)(*args)

    @contextlib.contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """A block of the user's code: it may `os.chdir`; what it raises is told in one line."""
        try:
            with contextlib.chdir(self._folder):
                yield
                self._folder = os.getcwd()
        except BaseException as error:  # SystemExit, too
            if isinstance(error, UserError | KeyboardInterrupt) or is_out_of_memory(error):
                raise  # lack of memory, so that the batch can be halved
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            raise UserError(f"{self.path}: {what} {_told(error, self.path)}") from error

    def check(self, is_fit: object, name: str, expected: str, got: object) -> None:
        """UserError where something that the file gives does not fit."""
        expect(is_fit, f"{self.path}: {name}: expected {expected}, got {got}")


def kind(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None:
        return "nothing (None)"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a {type(value).__name__}{size}"


def _put_first(folder: Path) -> None:
    """Let the user's code import what lies beside it, and not our `model` beside the commands."""
    main, ours = vars(sys.modules["__main__"]), PACKAGE.parent
    if Path(main.get("__file__", "")).resolve().parent == ours == Path(sys.path[0]).resolve():
        del sys.path[0]
        del main["__file__"]  # processes that the user's code spawns would import our command
    sys.path.insert(0, str(folder))
    if _OLD_IMPORT not in sys.meta_path:
        sys.meta_path.append(_OLD_IMPORT)  # at the end: asked where the user has no such module


class _OldImport(importlib.abc.Loader):
    """Finds a module `adapter`, from which adapters once imported their names."""

    def find_spec(self, name: str, *_: object) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == "adapter" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _once_of_adapter


_OLD_IMPORT, _note_once = _OldImport(), cache(note)
_OLD = "`from adapter import Decision, Tokens` is now `from historylens import Decision, Tokens`"


def _once_of_adapter(name: str) -> type:
    """A module's `__getattr__`: names that `from adapter import ...` gave."""
    for known in (Decision, History, Tokens):
        if name == known.__name__:
            _note_once(_OLD)
            return known
    raise AttributeError(f"module 'adapter' has no attribute {name!r}")


def _told(error: BaseException, path: Path) -> str:
    """What an exception says, and where in the user's code it was raised, on one line."""
    if isinstance(error, CaptureError):
        return (
            f"cannot be looked into: {error}; in this file, layers(model) chooses layers, and "
            "CAPTURE = {...} gives capture's arguments softmax and heads"
        )
    said, place = told(error), str(path)  # where a call itself does not fit, as by its arguments
    adapter, frames = path.resolve(), traceback.extract_tb(error.__traceback__)
    lines = [(one.filename, one.lineno) for one in frames if _is_users(Path(one.filename), adapter)]
    if isinstance(error, SyntaxError) and error.filename:
        said = f"SyntaxError: {error.msg}"
        lines.append((error.filename, error.lineno))
    if lines:
        file, line = Path(lines[-1][0]), lines[-1][1]  # the innermost
        file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        place = f"{file}:{line}"
    hint = _way_to(error.name) if isinstance(error, ModuleNotFoundError) and error.name else ""
    more = "" if os.environ.get(TRACEBACK) else f"; {TRACEBACK}=1 shows the traceback"
    return f"raised {said} ({place}){hint}{more}"


def _is_users(file: Path, adapter: Path, is_own: bool = False) -> bool:
    """Whether a file is the adapter, or its own, or beside it or deeper, and is no library."""
    is_own |= adapter.parent in file.parents and "site-packages" not in file.parts
    return file == adapter or (is_own and not {PACKAGE, *LIBRARIES} & {*file.parents})


def _way_to(name: str) -> str:
    """What to do about a module that is missing; of a package that is there, installing is none."""
    top = name.partition(".")[0]
    if top == name or not (top in sys.modules or importlib.util.find_spec(top)):
        return f"; `pip install {top}`, or put it beside the file"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        top += f" {importlib.metadata.version(top)}"
    return f"; {top} is there, but this version of it has no {name}: another one may have it"
