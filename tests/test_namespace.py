"""The house: what may import what, what is packaged, and whose modules a name finds."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "historylens"
FILES = sorted(TOOL.rglob("*.py"))
OUTSIDE = {"torch", "numpy", "matplotlib", "seaborn", "tqdm", "PIL"}
FLOORS = (  # a room imports from floors below its own
    "common < history capture < tokens < metrics < insights < compression < agent < "
    "adapter pictures report < effects comparison < analysis"
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS.split(" < ")) for room in rooms.split()}


def imported(file):
    """Dotted names that a file imports, wherever in it: modules and what is taken from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not getattr(node, "level", 0), f"{file}: a relative import"
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (start + alias.name for alias in node.names)


def room_of(file):
    return file.relative_to(TOOL).with_suffix("").parts[0]


def test_the_house_has_few_rooms():
    commands = {"visualize_attention", "compare_compression", "train"}
    assert {path.stem for path in ROOT.glob("*.py")} == commands | {"config", "model", "dataset"}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == {"ad", "historylens", "benchmarks", "examples", "tests"}
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms == set(FLOOR)  # each room of the tool is on a floor
    assert len(rooms) <= 14


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TOOL)))
def test_a_file_of_the_tool_imports_little_from_outside_and_only_from_below(file):
    own = room_of(file)
    for name in imported(file):
        top, room, *_ = (*name.split("."), "")  # no room: the face of the tool is for its users
        assert top in {"historylens"} | OUTSIDE | sys.stdlib_module_names
        if top == "historylens" and own not in ("__init__", room):
            assert FLOOR.get(room, len(FLOOR)) < FLOOR[own], name


def test_what_is_packaged_is_the_tool():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {file.parent.relative_to(ROOT) for file in FILES}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(f.parts) for f in folders}
    needed = "\n".join(project["project"]["dependencies"])
    pinned = (ROOT / "requirements.txt").read_text()
    assert re.findall(r"^\w+", needed, re.MULTILINE) == re.findall(r"^\w+", pinned, re.MULTILINE)
    module, name = project["project"]["scripts"]["historylens"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


NAMES = ("model", "config", "dataset", "adapter", "attention")
COMMANDS = {
    "visualize_attention.py": ["--num-samples=1", "--num-figures=0", "--num-effects=0", "--dpi=20"],
    "compare_compression.py": ["--seeds=2", "--episodes=2", "--budgets=5", "--strategies=recent"],
}
VISUALIZE, COMPARE = COMMANDS


def example(early="", late="pass"):
    text = (ROOT / "examples" / "sar_mha.py").read_text() + early
    return text.replace("    return Model()", f"    {late}\n    return Model()")


def ran(script, adapter, path=""):
    """Run a command on an adapter, with a folder on the module search path: stdout and stderr."""
    command = [sys.executable, script, "--adapter", adapter.name, *COMMANDS[script.name]]
    where = {"cwd": adapter.parent, "env": os.environ | {"PYTHONPATH": str(path)}}
    done = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# Says at the end of a command which modules of ours are loaded, one a line.
OURS = f"""
import atexit, sys

@atexit.register
def say():
    for name, module in sys.modules.items():
        file = str(getattr(module, "__file__", None))
        if file.startswith("{ROOT}") and "site-packages" not in file:
            print("ours:", name)
"""


@pytest.mark.parametrize(("turn", "command"), [(0, VISUALIZE), (1, VISUALIZE), (2, COMPARE)])
def test_names_of_the_users_are_theirs_whatever_they_are(tmp_path, turn, command):
    if command == COMPARE:
        pytest.importorskip("gymnasium")
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    lines = []
    for i, name in enumerate(NAMES, start=turn):
        form, imported = [(".py", ""), ("/__init__.py", ""), ("/part.py", ".part")][i % 3]
        file = (home, elsewhere)[i % 2] / f"{name}{form}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"print('theirs: {name}')\n")
        lines.append(f"import {name}{imported}")
    (home / "corridor.py").write_text((ROOT / "examples" / "corridor.py").read_text())
    (home / "mine.py").write_text(example("\n".join([*lines[:3], OURS]), "; ".join(lines[3:])))
    said, warned = ran(ROOT / command, home / "mine.py", elsewhere)
    assert {f"theirs: {name}" for name in NAMES} <= set(said.splitlines())
    assert set(re.findall(r"^ours: (\w+)", said, re.MULTILINE)) == {"historylens"}
    assert "note: " not in warned
    assert list(home.glob("figs/*/*.png"))


def test_what_lies_beside_the_commands_is_beside_an_adapter_there(tmp_path):
    shutil.copytree(TOOL, tmp_path / "historylens")
    shutil.copy(ROOT / VISUALIZE, tmp_path)
    (tmp_path / "model.py").write_text("print('theirs: model')\n")
    spawn = (
        "from concurrent.futures import ProcessPoolExecutor as P; import multiprocessing as m; "
        "print('spawned', P(1, m.get_context('spawn')).submit(abs, -3).result())"
    )
    (tmp_path / "mine.py").write_text(example("import model", late=spawn))
    said, _ = ran(tmp_path / VISUALIZE, tmp_path / "mine.py")
    for words in ("theirs: model\n", "spawned 3\n", "INSIGHT"):
        assert words in said


@pytest.mark.parametrize("name", ["mine.py", "adapter.py"])
def test_the_old_import_goes_on_working_with_a_note(tmp_path, name):
    text = example().replace("from historylens import Decision", "from adapter import Decision")
    (tmp_path / name).write_text(text)
    _, warned = ran(ROOT / VISUALIZE, tmp_path / name)
    now = "`from adapter import Decision, Tokens` is now `from historylens import Decision, Tokens`"
    assert re.findall(r"^note: (.*)", warned, re.MULTILINE) == [now]
