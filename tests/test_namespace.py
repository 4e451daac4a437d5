"""The house: what may import what, what is packaged, and whose modules a name finds."""

import ast
import importlib
import json
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
OUTSIDE = {"torch", "numpy", "matplotlib", "seaborn", "tqdm", "PIL", "jinja2"}
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
    "visualize_attention.py": "--num-samples=1 --num-figures=0 --num-effects=0 --layers=0 --dpi=10",
    "compare_compression.py": "--seeds=2 --episodes=2 --budgets=5 --strategies=recent --confirm=0",
}
VISUALIZE, COMPARE = COMMANDS
# Runs each command as a python of its own would, but imports what is not ours once.
RUN = f"""
import json, os, runpy, sys
import matplotlib.pyplot, seaborn, torch, tqdm

def ours():
    files = {{name: str(getattr(m, "__file__", None)) for name, m in sys.modules.items()}}
    return [n for n, f in files.items() if f.startswith("{ROOT}") and "site-packages" not in f]

assert not ours()
for home, script, path, argv in json.load(sys.stdin):
    if os.fork() == 0:
        os.chdir(home)
        for stream in (1, 2):
            os.dup2(os.open(f"{{stream}}.txt", os.O_WRONLY | os.O_CREAT), stream)
        sys.path[:1], sys.argv = [os.path.dirname(script), path], [script, *argv]
        runpy.run_path(script, run_name="__main__")
        print(*(f"ours: {{name}}" for name in ours()), sep="\\n", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, open(f"{{home}}/2.txt").read()
"""
SPAWN = (
    "from concurrent.futures import ProcessPoolExecutor as P; import multiprocessing as m; "
    "print('spawned', P(1, m.get_context('spawn')).submit(abs, -3).result())"
)


def example(early="", late="pass"):
    text = (ROOT / "examples" / "sar_mha.py").read_text() + early
    return text.replace("    return Model()", f"    {late}\n    return Model()")


def of_many_names(home, elsewhere, turn):
    """An adapter, and beside it or elsewhere modules of all `NAMES`, in forms that take turns."""
    lines = []
    for i, name in enumerate(NAMES, start=turn):
        form, imported = [(".py", ""), ("/__init__.py", ""), ("/part.py", ".part")][i % 3]
        file = (home, elsewhere)[i % 2] / f"{name}{form}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"print('theirs: {name}')\n")
        lines.append(f"import {name}{imported}")
    shutil.copy(ROOT / "examples" / "corridor.py", home)
    (home / "mine.py").write_text(example("\n".join(lines[:3]), "; ".join(lines[3:])))


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Folders of adapters, and in each what a command said on stdout and stderr: 1.txt, 2.txt."""
    folder, jobs = tmp_path_factory.mktemp("namespace"), []

    def job(home, script=ROOT / VISUALIZE, adapter="mine.py", path=""):
        argv = ["--adapter", adapter, *COMMANDS[script.name].split()]
        jobs.append([str(folder / home), str(script), str(path), argv])

    for turn, script in enumerate((VISUALIZE, VISUALIZE, COMPARE)):
        of_many_names(folder / str(turn), folder / f"elsewhere{turn}", turn)
        job(str(turn), ROOT / script, path=folder / f"elsewhere{turn}")
    shutil.copytree(TOOL, folder / "beside" / "historylens")
    shutil.copy(ROOT / VISUALIZE, folder / "beside")
    (folder / "beside" / "model.py").write_text("print('theirs: model')\n")
    (folder / "beside" / "mine.py").write_text(example("import model", late=SPAWN))
    job("beside", folder / "beside" / VISUALIZE)
    for name in ("mine.py", "adapter.py"):
        (folder / f"old {name}").mkdir()
        text = example().replace("from historylens import Dec", "from adapter import Dec")
        (folder / f"old {name}" / name).write_text(text)
        job(f"old {name}", adapter=name)
    options = {"input": json.dumps(jobs), "cwd": folder, "text": True, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", RUN], check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("home", ["0", "1", "2"])
def test_names_of_the_users_are_theirs_whatever_they_are(homes, home):
    said = (homes / home / "1.txt").read_text()
    assert {f"theirs: {name}" for name in NAMES} <= set(said.splitlines())
    assert set(re.findall(r"^ours: (\w+)", said, re.MULTILINE)) == {"historylens"}
    assert "note: " not in (homes / home / "2.txt").read_text()
    assert list((homes / home).glob("figs/*/*.png"))


def test_what_lies_beside_the_commands_is_beside_an_adapter_there(homes):
    for words in ("theirs: model\n", "spawned 3\n", "INSIGHT"):
        assert words in (homes / "beside" / "1.txt").read_text()


@pytest.mark.parametrize("name", ["mine.py", "adapter.py"])
def test_the_old_import_goes_on_working_with_a_note(homes, name):
    warned = (homes / f"old {name}" / "2.txt").read_text()
    now = "`from adapter import Decision, Tokens` is now `from historylens import Decision, Tokens`"
    assert re.findall(r"^note: (.*)", warned, re.MULTILINE) == [now]
