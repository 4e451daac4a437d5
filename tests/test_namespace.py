"""The house: what may import what, what is packaged, and whose modules a name finds."""

import ast
import os
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
FLOORS = [  # a room imports from floors below its own
    ["common"],
    ["history", "capture"],
    ["tokens"],
    ["metrics"],
    ["insights"],
    ["compression"],
    ["agent"],
    ["adapter", "pictures", "report"],
    ["effects", "comparison"],
    ["analysis"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(file):
    """Dotted names that a file imports, wherever in it: modules and what is taken from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file):
    return file.relative_to(TOOL).with_suffix("").parts[0]


def test_the_house_has_few_rooms():
    modules = {path.stem for path in ROOT.glob("*.py")}
    commands = {"visualize_attention", "compare_compression", "train"}
    assert modules == commands | {"config", "model", "dataset"}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert folders == {"ad", "historylens", "benchmarks", "examples"}
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms == set(FLOOR)  # each room of the tool is on a floor
    assert len(rooms) <= 14


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TOOL)))
def test_a_file_of_the_tool_imports_little_from_outside_and_only_from_below(file):
    names = list(imported(file))
    outside = {name.partition(".")[0] for name in names} - {"historylens"}
    assert outside <= OUTSIDE | sys.stdlib_module_names
    if file == TOOL / "__init__.py":
        return
    own = room_of(file)
    for name in names:
        if name.startswith("historylens"):
            room = (*name.split("."), "")[1]  # none: the face of the tool is for its users
            assert room == own or FLOOR.get(room, len(FLOOR)) < FLOOR[own], name


def test_what_is_packaged_is_the_tool():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {file.parent.relative_to(ROOT) for file in FILES}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(f.parts) for f in folders}
    pinned = (ROOT / "requirements.txt").read_text().split()
    needed, listed = ([line.split("=")[0].rstrip(">") for line in lines]
                      for lines in (project["project"]["dependencies"], pinned))  # fmt: skip
    assert needed == listed
    module, name = project["project"]["scripts"]["historylens"].split(":")
    code = (ROOT / module.replace(".", "/") / "__init__.py").read_text()
    assert f"\ndef {name}() -> None:" in code


# Names of the user's

NAMES = ("model", "config", "dataset", "adapter", "attention")
COMMANDS = {
    "visualize_attention.py": ["--num-samples=1", "--num-figures=0", "--num-effects=0", "--dpi=20"],
    "compare_compression.py": ["--seeds=2", "--episodes=2", "--budgets=5", "--strategies=recent"],
}
VISUALIZE, COMPARE = COMMANDS
AT_THE_END = """
import atexit, sys

@atexit.register
def say():
    for name, module in sys.modules.items():
        file = str(getattr(module, "__file__", None))
        if file.startswith("ROOT") and "site-packages" not in file:
            print("OURS", name)
"""


def example(early="", late="pass"):
    """The text of an adapter that imports something, and at its end says what of ours is there."""
    text = (ROOT / "examples" / "sar_mha.py").read_text() + AT_THE_END.replace("ROOT", str(ROOT))
    return text.replace("    return Model()", f"    {late}\n    return Model()") + early


def ran(script, adapter, *path):
    """Run a command on an adapter, with folders on the module search path: stdout and stderr."""
    command = [sys.executable, script, "--adapter", adapter.name, *COMMANDS[script.name]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        command, cwd=adapter.parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(("turn", "command"), [(0, VISUALIZE), (1, VISUALIZE), (2, COMPARE)])
def test_names_of_the_users_are_theirs_whatever_they_are(tmp_path, turn, command):
    if command == COMPARE:
        pytest.importorskip("gymnasium")
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    lines = []
    for i, name in enumerate(NAMES, start=turn):
        form = (f"{name}.py", f"{name}/__init__.py", f"{name}/part.py")[i % 3]
        file = (home, elsewhere)[i % 2] / form
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"print('theirs: {name}')\n")
        lines.append(f"import {name}.part" if form.endswith("part.py") else f"import {name}")
    (home / "corridor.py").write_text((ROOT / "examples" / "corridor.py").read_text())
    (home / "mine.py").write_text(example("\n".join(lines[:3]), "; ".join(lines[3:])))
    said, warned = ran(ROOT / command, home / "mine.py", elsewhere)
    assert {f"theirs: {name}" for name in NAMES} <= set(said.splitlines())
    ours = {line.removeprefix("OURS ") for line in said.splitlines() if line.startswith("OURS ")}
    assert {name.partition(".")[0] for name in ours} == {"historylens"}
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
    assert "theirs: model\n" in said
    assert "spawned 3\n" in said
    assert "INSIGHT" in said


@pytest.mark.parametrize("name", ["mine.py", "adapter.py"])
def test_the_old_import_goes_on_working_with_a_note(tmp_path, name):
    text = example().replace("from historylens import Decision", "from adapter import Decision")
    (tmp_path / name).write_text(text)
    _, warned = ran(ROOT / VISUALIZE, tmp_path / name)
    assert [line for line in warned.splitlines() if line.startswith("note: ")] == [
        "note: `from adapter import Decision, Tokens` is now "
        "`from historylens import Decision, Tokens`"
    ]
