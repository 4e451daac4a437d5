"""The house: what may import what, what is packaged, and whose modules a name finds."""

import ast
import importlib
import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from apart import run_apart

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


def is_ours(path):
    """Whether a path is of the project, and not of an environment that stands in its folder."""
    path = Path(path).resolve()
    return path.is_relative_to(ROOT) and not path.is_relative_to(Path(sys.prefix).resolve())


def ours():
    files = {name: getattr(m, "__file__", None) or "/" for name, m in sys.modules.items()}
    return [name for name, file in files.items() if is_ours(file)]


def as_anew(argv):
    """Run a command in a process that has none of our modules, and say which ones it finds."""
    for name in ours():
        del sys.modules[name]
    sys.meta_path[:] = [one for one in sys.meta_path if "historylens" not in type(one).__module__]
    path = [path for path in sys.path if not is_ours(path)]
    script, elsewhere, *_ = argv
    sys.path[:], sys.argv = [str(Path(script).parent), elsewhere, *path], [script, *argv[2:]]
    runpy.run_path(script, run_name="__main__")
    print(*(f"ours: {name}" for name in ours()), sep="\n")


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A folder of folders with an adapter each, and by their names what a command said there."""
    folder, homes = tmp_path_factory.mktemp("namespace"), {}
    for name in ("matplotlib.pyplot", *OUTSIDE):
        importlib.import_module(name)  # once, and not in each process

    def run(home, script=ROOT / VISUALIZE, adapter="mine.py", elsewhere=""):
        argv = [script, elsewhere, "--adapter", adapter, *COMMANDS[script.name].split()]
        homes[home] = end = run_apart(as_anew, argv, folder / home)
        assert end.code == 0, end.err

    for turn, script in enumerate(COMMANDS):
        of_many_names(folder / str(turn), folder / f"elsewhere{turn}", turn)
        run(str(turn), ROOT / script, elsewhere=folder / f"elsewhere{turn}")
    old = "from historylens import Dec", "from adapter import Dec"
    shutil.copytree(TOOL, folder / "beside" / "historylens")
    shutil.copy(ROOT / VISUALIZE, folder / "beside")
    (folder / "beside" / "model.py").write_text("print('theirs: model')\n")
    (folder / "beside" / "mine.py").write_text(example("import model", late=SPAWN).replace(*old))
    run("beside", folder / "beside" / VISUALIZE)
    (folder / "old").mkdir()
    (folder / "old" / "adapter.py").write_text(example().replace(*old))
    run("old", adapter="adapter.py")
    return folder, homes


@pytest.mark.parametrize("home", ["0", "1"])
def test_names_of_the_users_are_theirs_whatever_they_are(homes, home):
    folder, said = homes[0] / home, homes[1][home]
    assert {f"theirs: {name}" for name in NAMES} <= set(said.out.splitlines())
    assert set(re.findall(r"^ours: (\w+)", said.out, re.MULTILINE)) == {"historylens"}
    assert "note: " not in said.err
    assert list(folder.glob("figs/*/*.png"))


def test_what_lies_beside_the_commands_is_there_and_the_old_import_works_with_a_note(homes):
    for words in ("theirs: model\n", "spawned 3\n", "INSIGHT"):
        assert words in homes[1]["beside"].out
    now = "`from adapter import Decision, Tokens` is now `from historylens import Decision, Tokens`"
    for home in ("beside", "old"):
        assert re.findall(r"^note: (.*)", homes[1][home].err, re.MULTILINE) == [now]
