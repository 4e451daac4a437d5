"""The example adapters, run as a user runs them."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from adapter.file import load_adapter
from adapter.subject import AdaptedSubject
from attention import figures
from config import UserError, run_command
from visualize_attention import main

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ADAPTERS = {path.stem: path for path in EXAMPLES if path.stem != "corridor"}
NEEDS = {"gpt2_query_first": "transformers"}
LAYERS = {"sar_mha": 2, "gpt2_query_first": 3, "rotary_sdpa": 3, "explicit_softmax": 2}
HEADS = {"sar_mha": 4, "gpt2_query_first": 4, "rotary_sdpa": 6, "explicit_softmax": 2}


@pytest.fixture(params=sorted(ADAPTERS))
def example(request):
    needed = NEEDS.get(request.param)
    if needed and find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    return request.param


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("heatmap", "curve_lines", "summary", "layers", "deletion_curves"):
        monkeypatch.setattr(figures, name, lambda path, *_, **__: Path(path).write_bytes(b"png"))
    return tmp_path


def test_all_four_kinds_are_there():
    assert set(ADAPTERS) == set(LAYERS)


def test_the_main_job_runs_on_it(example, home):
    main(["--adapter", str(ADAPTERS[example]), "--num-samples", "3", "--out", "out"])
    content = json.loads(Path("out/metrics.json").read_text())
    assert len(content["layers"]) == LAYERS[example]
    assert {len(x["head_means"]["entropy"]) for x in content["layers"]} == {HEADS[example]}
    assert len(content["samples"]) == 3
    assert all(sample["title"] for sample in content["samples"])
    rows = list(csv.DictReader(Path("out/metrics.csv").read_text().splitlines()))
    assert len(rows) == 3 * LAYERS[example] * (HEADS[example] + 1)
    drawn = {path.name for path in Path("out/layer_0").iterdir()}
    assert {f"attention_{kind}_sample2_layer0.png" for kind in ("heatmap", "lines")} < drawn


def test_attention_on_transitions_and_on_the_rest_adds_up(example, home):
    main(["--adapter", str(ADAPTERS[example]), "--num-samples", "3", "--num-figures", "0"])
    rows = csv.DictReader(Path("figs/attention/metrics.csv").read_text().splitlines())
    for row in rows:
        mass = float(row["mean_context_attention"]) * int(row["n_context"])
        assert mass + float(row["mass_self"]) == pytest.approx(1, abs=1e-5)


def test_the_row_measured_is_that_of_the_token_that_decides(home):
    path = ADAPTERS["explicit_softmax"]
    main(["--adapter", str(path), "--num-samples", "3", "--num-figures", "1", "--out", "out"])
    content = json.loads(Path("out/metrics.json").read_text())
    subject = AdaptedSubject.of(load_adapter(path), 3, 0, torch.device("cpu"))
    for i, n in enumerate((8, 16, 24)):
        weights = []
        hooks = [
            attention.softmax.register_forward_hook(
                lambda *call, kept=weights: kept.append(call[-1])
            )
            for attention in subject.model.attentions
        ]
        subject.logits(subject.history([i]))
        for hook in hooks:
            hook.remove()
        for layer, found in zip(weights, content["layers"], strict=True):
            row = layer[0].mean(0)[0]  # the query stands first
            expected = row[1 : n + 1].mean().item()
            assert found["per_sample"]["mean_context_attention"][i] == pytest.approx(expected)
            assert found["per_sample"]["mass_self"][i] == pytest.approx(row[0].item())
    uniform = sum(1 / (n + 1) for n in (8, 16, 24)) / 3  # padding is not counted
    assert content["uniform"]["mean_context_attention"] == pytest.approx(uniform)


def test_the_model_acts_on_shorter_history(example, home):
    subject = AdaptedSubject.of(load_adapter(ADAPTERS[example]), 1, 0, torch.device("cpu"))
    history = subject.history([0])
    whole = subject.view.logits(history)
    kept = torch.tensor([[0, 2, history.n - 1]])
    assert subject.view.logits(history.take(kept)).shape == whole.shape
    assert not torch.equal(subject.view.logits(history.take(kept)), whole)
    torch.testing.assert_close(subject.forward([0]), whole)


def test_the_real_command_runs_wherever_it_is_called(tmp_path):
    command = [sys.executable, str(ROOT / "visualize_attention.py"), "--num-samples", "1"]
    command += ["--adapter", str(ADAPTERS["sar_mha"]), "--layers", "1", "--dpi", "40"]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "INSIGHT" in ran.stdout
    assert (tmp_path / "figs/attention/layer_1/attention_heatmap_sample0_layer1.png").is_file()


def test_a_comparison_runs_in_its_environment(home):
    pytest.importorskip("gymnasium")
    from compare_compression import main as compare

    flags = ["--seeds", "2", "--episodes", "2", "--strategies", "recent", "top-k"]
    compare(["--adapter", str(ADAPTERS["sar_mha"]), "--budgets", "5", *flags])
    content = json.loads(Path("figs/compression/results.json").read_text())
    assert content["fingerprint"]["goals"] == ["left end", "right end"]
    assert content["fingerprint"]["n_max"] == 30


def test_a_comparison_without_an_environment_is_one_line(home, capsys):
    from compare_compression import main as compare

    with pytest.raises(SystemExit) as end:
        run_command(lambda: compare(["--adapter", str(ADAPTERS["rotary_sdpa"])]))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1
    assert "no make_env()" in said


@pytest.mark.parametrize("flag", [("--checkpoint", "here"), ("--positions", "original")])
def test_flags_of_checkpoints_have_no_place_beside_an_adapter(home, flag):
    from compare_compression import main as compare

    with pytest.raises(UserError, match=f"{flag[0]} has no meaning beside --adapter"):
        compare(["--adapter", str(ADAPTERS["sar_mha"]), *flag])
