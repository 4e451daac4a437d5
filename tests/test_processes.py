"""Work shared over processes and cut to fit memory gives what one process gives at once."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ad_agent, make_histories, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_train import TINY, flags, numbers_of, run_of

from historylens import analysis
from historylens.analysis import AnalysisConfig, Job, draw_samples, measure
from historylens.common.batches import even_parts, is_out_of_memory
from historylens.common.errors import UserError
from historylens.common.processes import ALONE, Group, join
from historylens.metrics import NAMES, Metrics

ROOT = Path(__file__).parent.parent
TIMEOUT = 400
N_SAMPLES = 19


class InTurn(Group):
    """A rank of a job whose ranks run one after another, so that none waits for another."""

    def barrier(self):
        pass

    def together(self):
        return contextlib.nullcontext()


@pytest.fixture
def agent(tiny_model):
    return ad_agent(tiny_model, make_histories(), [(i % 3, 11 + i, 1) for i in range(N_SAMPLES)])


@pytest.fixture
def analysed(agent, tmp_path):
    """Gives metrics (S, L, H + 1, M) and the samples drawn by some ranks of one job."""

    def run(n_drawn, ranks=(ALONE,), **settings):
        config = AnalysisConfig(out=str(tmp_path / "out"), num_figures=n_drawn, **settings)
        job = Job.of(agent, config, ALONE)
        metrics, drawn = Metrics(N_SAMPLES, job.layers, job.heads), []
        blank = SimpleNamespace(draw=lambda *args, **kwargs: None)
        for rank in ranks:
            measure(replace(job, group=rank), metrics)
            numbers, _ = draw_samples(replace(job, group=rank), metrics, blank)
            drawn += numbers[1]
        return metrics.gather(ALONE).values, drawn

    return run


# Shares


@given(n=st.integers(0, 60), size=st.integers(1, 9))
def test_shares_are_all_items_once_and_differ_by_one_at_most(n, size):
    shares = [Group(rank, size).share(n) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(part=st.integers(1, 9), size=st.integers(1, 9))
def test_equal_slices_put_together_are_the_batch(part, size):
    batch = list(range(part * size))
    slices = [batch[Group(rank, size).equal_slice(len(batch))] for rank in range(size)]
    assert list(itertools.chain(*slices)) == batch
    assert {len(s) for s in slices} == {part}


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(UserError, match="3 processes can share evenly, got 32"):
        Group(0, 3).equal_slice(32)


@given(start=st.integers(0, 9), n=st.integers(0, 60), size=st.integers(1, 20))
def test_even_parts_are_few_in_order_and_equally_long(start, n, size):
    parts = even_parts(start, start + n, size)
    assert list(itertools.chain(*parts)) == list(range(start, start + n))
    lengths = [len(part) for part in parts]
    assert len(parts) == -(-n // size)
    assert max(lengths, default=0) <= size
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@pytest.mark.parametrize("size", [2, 3, 25])
@pytest.mark.parametrize("n_drawn", [0, 5, N_SAMPLES])
def test_ranks_together_measure_every_sample_to_the_bit_and_draw_each_once(
    analysed, monkeypatch, size, n_drawn
):
    monkeypatch.setattr(analysis, "MAX_TOKENS", 4 * 12)
    monkeypatch.setattr(analysis, "MAX_DRAWN", 3)
    together, drawn = analysed(n_drawn, [InTurn(rank, size) for rank in range(size)])
    alone, _ = analysed(n_drawn)
    np.testing.assert_array_equal(together, alone)
    assert sorted(drawn) == list(range(n_drawn))


# Memory


def limit_batches(model, monkeypatch, most, error=None):
    """Let forward passes of more than `most` samples fail; gives the sizes tried."""
    forward, sizes = model.forward, []

    def limited(states, *rest):
        sizes.append(len(states))
        if len(states) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return forward(states, *rest)

    monkeypatch.setattr(model, "forward", limited)
    return sizes


@pytest.mark.parametrize("n_drawn", [0, 7, N_SAMPLES])
def test_what_does_not_fit_memory_is_halved_and_said_once(
    analysed, agent, monkeypatch, capsys, n_drawn
):
    expected, _ = analysed(n_drawn)
    sizes = limit_batches(agent.model, monkeypatch, 3)
    capsys.readouterr()
    found, drawn = analysed(n_drawn)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert drawn == list(range(n_drawn))
    assert sum(size for size in sizes if size <= 3) == N_SAMPLES
    assert len([size for size in sizes if size > 3]) <= 6
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert len(notes) == (n_drawn > 3) + (N_SAMPLES - n_drawn > 3)
    assert all("does not fit the memory of cpu" in note for note in notes)


def test_a_sample_that_does_not_fit_alone_is_a_users_error(analysed, agent, monkeypatch):
    limit_batches(agent.model, monkeypatch, 0)
    with pytest.raises(UserError, match="a single sample of 12 tokens does not fit"):
        analysed(0)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_only_a_lack_of_memory_halves_a_batch(analysed, agent, monkeypatch, error, is_memory):
    sizes = limit_batches(agent.model, monkeypatch, 10, error)
    with contextlib.nullcontext() if is_memory else pytest.raises(type(error)):
        analysed(0)
    assert is_memory == (len(sizes) > 1)


def test_a_real_lack_of_memory_on_a_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_bfloat16_moves_the_metrics_a_little(analysed):
    full, half = (analysed(5, precision=name)[0] for name in ("float32", "bfloat16"))
    assert full.dtype == half.dtype == np.float64
    share = NAMES.index("normalised_entropy")
    assert 0 < np.abs(full - half)[..., share].max() < 0.1
    mean, on_self = (half[..., NAMES.index(x)] for x in ("mean_context_attention", "mass_self"))
    np.testing.assert_allclose(11 * mean + on_self, 1, atol=1e-6)


# Processes


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_forms_no_group(monkeypatch, size):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    with join() as group:
        assert group == ALONE
        assert group.gather("a") == ["a"]
        assert (group.broadcast("a"), group.mean(3.5)) == ("a", 3.5)
        group.barrier()
        module = torch.nn.Linear(2, 2)
        assert group.averaging(module, torch.device("cpu")) is module
    assert not torch.distributed.is_initialized()


def test_half_of_torchruns_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK is not set"), join():
        pass


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="at most 2 processes on this machine"):
        Group(2, 3, local_rank=2).device(torch.device("cuda"))
    with pytest.raises(UserError, match="got cuda:0"):
        Group(0, 3).device(torch.device("cuda:0"))
    assert Group(2, 3, local_rank=2).device(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.device(torch.device("cuda:1")) == torch.device("cuda:1")


def start(n_processes, *argv, **more):
    """A command as its own job: alone, or as `torchrun` starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n_processes]
    command = [sys.executable, *(launcher if n_processes > 1 else []), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=env, **pipes, **more)


def finish(process, code=0):
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()  # torchrun takes its processes along
    assert process.returncode == code, err
    return out, err


PRIMITIVES = """
import json, os, sys
from pathlib import Path
from historylens.common.errors import UserError, run_command
from historylens.common.processes import join

def main():
    with join() as group:
        seen = {"gathered": group.gather(group.rank * 10), "mean": group.mean(group.rank + 1.0)}
        seen["broadcast"] = group.broadcast({"from": group.rank})
        for name, ranks in (("both", (0, 1)), ("second", (1,)), ("none", ())):
            try:
                with group.together():
                    if group.rank in ranks:
                        raise UserError("a mistake")
                seen[name] = "went on"
            except (UserError, SystemExit) as error:
                seen[name] = str(error)
        with group.told_once():
            print("told")
        Path(sys.argv[1], f"{group.rank}.json").write_text(json.dumps(seen))
        if group.rank == 1:
            os._exit(7)
        group.gather(None)

run_command(main)
"""


def test_two_processes_exchange_values_stop_together_and_end_when_one_dies(tmp_path):
    (tmp_path / "primitives.py").write_text(PRIMITIVES)
    out, err = finish(start(2, tmp_path / "primitives.py", tmp_path), code=1)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    both = {"mean": 1.5, "broadcast": {"from": 0}, "none": "went on"}
    assert first == both | {"gathered": [0, 10], "both": "a mistake", "second": "2"}
    assert second == both | {"gathered": None, "both": "2", "second": "a mistake"}
    assert out.count("told") == 1
    assert "exitcode  : 7" in err


def test_two_processes_write_what_one_writes(tmp_path, tiny_model):
    run = tmp_path / "run"
    write_checkpoint(run / "ckpt-30.pt", tiny_model)
    make_histories(n_episodes=300).save(run / "histories-test.npz")
    argv = [ROOT / "visualize_attention.py", "--checkpoint", run, "--dpi", 30]
    argv += ["--num-samples", 1500, "--num-figures", 3]
    jobs = [start(n, *argv, "--out", n, cwd=tmp_path) for n in (1, 2)]
    outputs = [finish(job)[0] for job in jobs]
    numbers, files = [], []
    for n in (1, 2):
        content = json.loads((tmp_path / str(n) / "metrics.json").read_text())
        content["meta"].pop("out")
        numbers.append(content)
        paths = [p for p in (tmp_path / str(n)).rglob("*.*") if p.name != "metrics.json"]
        files.append({p.relative_to(tmp_path / str(n)): p.read_bytes() for p in paths})
    assert len(numbers[1]["samples"]) == 1500
    assert numbers[0] == numbers[1]
    assert files[0] == files[1]
    assert "cpu, 2 processes" in outputs[1]
    assert outputs[1].count("OVERALL ATTENTION STATISTICS") == 1


def test_two_processes_train_as_one_on_the_same_batches(tmp_path):
    # Without averaging: an average over few updates would hide most of what they changed.
    changed = {"ema_decay": 0.0, "tf_dropout": 0.0, "n_updates": 12, "eval_every": 6}
    folders = [tmp_path / "1", tmp_path / "2"]
    jobs = [
        start(n, ROOT / "train.py", *flags(folder, **changed))
        for n, folder in enumerate(folders, 1)
    ]
    outputs = [finish(job)[0] for job in jobs]
    runs = [run_of(folder) for folder in folders]
    assert outputs[1].count("TEST GOALS") == 1
    for one, two in zip(*(numbers_of(run)["log"] for run in runs), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["step"] == one["step"]
    names = [sorted(path.name for path in run.iterdir()) for run in runs]
    assert names[0] == names[1]
    width = TINY["tf_n_embd"]
    for name in (name for name in names[0] if name.startswith("ckpt-")):
        one, two = (torch.load(run / name)["model"] for run in runs)
        for key in one:
            if key.endswith("in_proj_bias"):
                # A softmax does not see a bias of its keys: that gradient is rounding alone,
                # which Adam scales to full updates. Queries and values remain.
                for weights in (one, two):
                    weights[key][width : 2 * width] = 0
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_ends_the_training_job_with_a_clear_error(tmp_path):
    job = start(2, ROOT / "train.py", *flags(tmp_path, n_updates=10**6, eval_every=10**6))
    deadline = time.monotonic() + TIMEOUT
    while not (run_of(tmp_path) / "histories-test.npz").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, err = finish(job, code=1)
    assert "Signal 9 (SIGKILL) received" in err
    assert "rank      : 1" in err
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not (run_of(tmp_path) / "training.json").exists()
