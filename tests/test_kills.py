"""A kill before any change of a file costs nothing: the same command ends as if there was none.

    KILLS=100 python -m pytest tests/test_kills.py      # so many kills a command, not only a few

The changes are found by watching one run; the kills are spread over all of them.
"""

import json
import os
import shutil

import pytest
from apart import plain_files, run_apart, temporaries
from conftest import sharp_model, without_drawing, write_checkpoint
from test_train import TINY, flag_of
from test_visualize_attention import make_run

import compare_compression
import train
import visualize_attention
from historylens.pictures import INCOMPLETE

N_KILLS = int(os.environ.get("KILLS", 4))
ANALYSIS = ["--num-samples=3", "--num-figures=1", "--num-effects=0", "--dpi=20", "--device=cpu"]
COMPARISON = ["--strategies", "recent", "--budgets=3", "--seeds=1", "--episodes=2", "--confirm=0",
              "--device=cpu"]  # fmt: skip
TRAINING = [f"{flag_of(name)}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def homes(tmp_path_factory, tiny_config):
    """For each command a folder with what an earlier run left, and what an unbroken one makes."""
    with pytest.MonkeyPatch.context() as patch:
        without_drawing(patch)
        top = tmp_path_factory.mktemp("homes")
        make_run(top / "analysis" / "checkpoints" / "tiny", tiny_config)
        write_checkpoint(top / "comparison/checkpoints/tiny/ckpt-30.pt", sharp_model(tiny_config),
                         [[0, 1], [2, 2]], 30)  # fmt: skip
        (top / "training").mkdir()
        yield {
            "analysis": begun(top, visualize_attention.main, "analysis", ANALYSIS, "--seed=1"),
            "comparison": begun(
                top, compare_compression.main, "comparison", COMPARISON, "--seed=1"
            ),
            "training": begun(top, train.main, "training", TRAINING, None),
        }


def begun(top, main, name, argv, earlier):
    """A command, its folder before it runs, and after."""
    before, after = top / name, top / f"{name} after" / name
    if earlier:
        assert run_apart(main, [*argv, earlier], before).code == 0
    shutil.copytree(before, after)
    assert run_apart(main, argv, after).code == 0
    changes = after.with_name("changes").read_text().split()
    return main, argv, before, after, changes


def as_it_should_be(name, folder, before, after):
    """Whether a folder is what it was, or what it becomes, or says that it is neither."""
    now = plain_files(folder)
    if name == "analysis" and not (folder / "figs/attention" / INCOMPLETE).exists():
        return now in (plain_files(before), plain_files(after))
    results = folder / "figs/compression/results.json"
    if name == "comparison" and results.exists() and json.loads(results.read_text())["complete"]:
        said = {name: content for name, content in now.items() if "earlier-" not in name}
        return any(said.items() >= there.items() for there in (
            {k: v for k, v in plain_files(one).items() if k.startswith("figs/compression/r") and
             k.endswith("json")} for one in (before, after)))  # fmt: skip
    return True


@pytest.mark.parametrize("name", ["analysis", "comparison", "training"])
def test_a_kill_at_any_change_of_a_file_costs_nothing(homes, tmp_path, name):
    main, argv, before, after, changes = homes[name]
    n_kills = min(N_KILLS, len(changes))
    for kill_at in sorted({len(changes) * i // n_kills for i in range(n_kills)}):
        folder = tmp_path / str(kill_at) / name
        shutil.copytree(before, folder)
        assert run_apart(main, argv, folder, kill_at=kill_at).code == -9
        assert not [path for path in folder.rglob("*.png") if not path.stat().st_size]
        assert as_it_should_be(name, folder, before, after), (kill_at, changes[kill_at])
        more = ["--resume"] * bool([*folder.rglob("resume.pt")])
        end = run_apart(main, [*argv, *more], folder)
        is_over = "holds a run already" in end.err  # killed where all was done
        assert end.code == (2 if is_over else 0), (kill_at, end.err)
        assert plain_files(folder) == plain_files(after), (kill_at, changes[kill_at])
        assert not temporaries(folder)
        shutil.rmtree(folder)
