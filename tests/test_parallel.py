"""Work shared over processes and cut to fit memory gives what one process gives at once."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_histories, sharp_model
from hypothesis import given
from hypothesis import strategies as st

import analysis as module
from analysis import Analysis, even_parts, is_out_of_memory
from attention.metrics import ALL_METRICS, concatenate
from checkpoint import save_checkpoint
from collecting import Collected
from config import EnvConfig, ModelConfig, UserError, to_dict
from decisions import Decision
from parallel import ALONE, Group, join
from subject import ADSubject

ROOT = Path(module.__file__).parent
TINY = ModelConfig(
    n_transit=12, tf_n_layer=2, tf_n_head=2, tf_n_embd=16, tf_n_inner=24, grid_size=5
)
DECISIONS = [Decision(i % 3, 11 + i) for i in range(19)]
TIMEOUT = 400


def tiny_analysis(group=ALONE, model=None, **more):
    model = model or sharp_model(TINY)
    return Analysis(ADSubject(model, make_histories(), DECISIONS), [0, 1], group=group, **more)


def collected(analysis, n_drawn, collect=None):
    collect = collect or Collected(analysis.subject.n_samples)
    for batch in itertools.chain(analysis.measured(n_drawn), analysis.drawn(n_drawn)):
        collect.add(batch.metrics)
    return collect


def assert_same_metrics(found, expected, rtol=0.0):
    assert found.samples == tuple(found.samples)
    assert [s.index for s in found.samples] == [s.index for s in expected.samples]
    assert [s.title for s in found.samples] == [s.title for s in expected.samples]
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.layer == b.layer
        for name in ALL_METRICS:
            np.testing.assert_allclose(a.mean[name], b.mean[name], rtol=rtol, atol=rtol)
            np.testing.assert_allclose(a.heads[name], b.heads[name], rtol=rtol, atol=rtol)
    for name in ALL_METRICS:
        np.testing.assert_array_equal(found.uniform[name], expected.uniform[name])


# Shares


@given(n=st.integers(0, 60), size=st.integers(1, 9))
def test_shares_are_all_items_once_and_differ_by_one_at_most(n, size):
    shares = [Group(rank, size).share(n) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(part=st.integers(1, 9), size=st.integers(1, 9))
def test_equal_slices_put_together_are_the_batch(part, size):
    batch = torch.arange(part * size)
    slices = [batch[Group(rank, size).equal_slice(len(batch))] for rank in range(size)]
    assert torch.equal(torch.cat(slices), batch)
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


@pytest.mark.parametrize("size", [1, 2, 3, 25])
@pytest.mark.parametrize("n_drawn", [0, 5, 19])
def test_ranks_together_measure_every_sample_to_the_bit_and_draw_each_once(
    monkeypatch, size, n_drawn
):
    monkeypatch.setattr(module, "MAX_TOKENS", 4 * 12)
    monkeypatch.setattr(module, "MAX_DRAWN", 3)
    together, drawn, n_measured = Collected(len(DECISIONS)), [], []
    for rank in range(size):
        analysis = tiny_analysis(Group(rank, size))
        collected(analysis, n_drawn, together)
        n_measured.append(analysis.n_measured(n_drawn))
        assert n_measured[-1] == sum(len(b.samples) for b in analysis.measured(n_drawn))
        for batch in analysis.drawn(n_drawn):
            drawn += [batch.samples[i].index for i in batch.drawn]
            assert len(batch.attention[0].maps) == len(batch.drawn) > 0
    assert sum(n_measured) == len(DECISIONS) - n_drawn
    assert sorted(drawn) == list(range(n_drawn))
    alone = tiny_analysis()
    expected = collected(alone, n_drawn).over(ALONE, alone.subject.sample)
    assert_same_metrics(together.over(ALONE, alone.subject.sample), expected)


def test_collected_batches_in_any_order_equal_those_joined(monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 4 * 12)
    analysis = tiny_analysis()
    parts = [batch.metrics for batch in analysis.measured(0)]
    found = Collected(len(DECISIONS))
    for part in reversed(parts):
        found.add(part)
    assert_same_metrics(found.over(ALONE, analysis.subject.sample), concatenate(parts))


def test_a_sample_that_was_never_measured_is_missed():
    analysis = tiny_analysis()
    found = Collected(len(DECISIONS) + 1)
    collected(analysis, 0, found)
    with pytest.raises(ValueError, match="19 is missing"):
        found.over(ALONE, analysis.subject.sample)


# Memory


def limit_batches(model, most, error=None):
    """Let forward passes of more than `most` samples run out of memory; gives the sizes tried."""
    forward, sizes = model.forward, []

    def limited(states, *rest):
        sizes.append(len(states))
        if len(states) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return forward(states, *rest)

    model.forward = limited
    return sizes


@pytest.mark.parametrize("n_drawn", [0, 7, 19])
def test_what_does_not_fit_memory_is_halved_and_said_once(capsys, n_drawn):
    expected = collected(tiny_analysis(), n_drawn).over(ALONE, tiny_analysis().subject.sample)
    analysis = tiny_analysis()
    sizes = limit_batches(analysis.subject.model, 3)
    drawn = [b.samples[i].index for b in analysis.drawn(n_drawn) for i in b.drawn]
    assert drawn == list(range(n_drawn))
    capsys.readouterr()
    sizes.clear()
    found = collected(analysis, n_drawn)
    assert_same_metrics(found.over(ALONE, analysis.subject.sample), expected, rtol=1e-5)
    assert sum(size for size in sizes if size <= 3) == len(DECISIONS)
    assert len([size for size in sizes if size > 3]) <= 6
    notes = capsys.readouterr().err.strip().splitlines()
    assert len(notes) == (n_drawn > 3) + (len(DECISIONS) - n_drawn > 3)
    assert all("does not fit the memory of cpu" in note for note in notes)


def test_a_sample_that_does_not_fit_alone_is_one_line(capsys):
    analysis = tiny_analysis()
    limit_batches(analysis.subject.model, 0)
    with pytest.raises(UserError, match="a single sample of 12 tokens does not fit"):
        list(analysis.measured(0))


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
def test_only_a_lack_of_memory_halves_a_batch(capsys, error, is_memory):
    assert is_out_of_memory(error) == is_memory
    analysis = tiny_analysis()
    sizes = limit_batches(analysis.subject.model, 10, error)
    if is_memory:
        assert len(list(analysis.measured(0))) > 1
    else:
        with pytest.raises(type(error)):
            list(analysis.measured(0))
        assert sizes == [19]


def test_a_real_lack_of_memory_on_a_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_bfloat16_moves_the_metrics_a_little_and_leaves_float32_alone():
    full, half = tiny_analysis(), tiny_analysis(precision="bfloat16")
    a = collected(full, 5).over(ALONE, full.subject.sample).pooled("entropy")
    b = collected(half, 5).over(ALONE, half.subject.sample).pooled("entropy")
    assert 0 < np.abs(a - b).max() < 0.1
    (batch,) = half.measured(0)
    assert batch.logits.dtype == torch.float32
    np.testing.assert_allclose(batch.attention[1].query_rows.sum(-1), 1, atol=1e-6)


# Processes


def test_one_process_forms_no_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with join() as group:
            assert group == ALONE
            assert group.gather("a") == ["a"]
            assert (group.broadcast("a"), group.mean(3.5)) == ("a", 3.5)
            group.barrier()
            module_ = torch.nn.Linear(2, 2)
            assert group.averaging(module_, torch.device("cpu")) is module_
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
import json, os, sys, time
from pathlib import Path
from config import UserError, run_command
from parallel import join

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
            except UserError as error:
                seen[name] = str(error)
            except SystemExit as error:
                seen[name] = error.code
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
    assert first["gathered"] == [0, 10]
    assert second["gathered"] is None
    assert first["mean"] == second["mean"] == 1.5
    assert first["broadcast"] == second["broadcast"] == {"from": 0}
    assert (first["both"], second["both"]) == ("a mistake", 2)
    assert (first["second"], second["second"]) == (2, "a mistake")
    assert first["none"] == second["none"] == "went on"
    assert out.count("told") == 1
    assert "exitcode  : 7" in err


def test_two_processes_write_what_one_writes(tmp_path):
    run = tmp_path / "run"
    save_checkpoint(
        run / "ckpt-30.pt",
        {
            "step": 30,
            "config": to_dict(TINY, EnvConfig(grid_size=5, horizon=5)),
            "model": sharp_model(TINY).state_dict(),
        },
    )
    make_histories(n_episodes=300).save(run / "histories-test.npz")
    flags = ["--checkpoint", run, "--num-samples", 1500, "--num-figures", 3, "--dpi", 30]
    jobs = {n: start(n, ROOT / "visualize_attention.py", *flags, "--out", n, cwd=tmp_path)
            for n in (1, 2)}  # fmt: skip
    out = {n: finish(job)[0] for n, job in jobs.items()}
    found = {n: json.loads((tmp_path / str(n) / "metrics.json").read_text()) for n in jobs}
    for content in found.values():
        content["meta"].pop("out")
    assert len(found[2]["samples"]) == 1500
    assert found[1] == found[2]
    files = [
        {p.relative_to(tmp_path / str(n)): p.read_bytes() for p in (tmp_path / str(n)).rglob("*.*")}
        for n in jobs
    ]
    assert files[0].keys() == files[1].keys()
    for path in files[0].keys() - {Path("metrics.json")}:
        assert files[0][path] == files[1][path], path
    assert "cpu, 2 processes" in out[2]
    assert out[2].count("OVERALL ATTENTION STATISTICS") == 1


TRAINING = {
    "n_transit": 12, "horizon": 5, "grid_size": 3, "n_test_goals": 2, "n_validation_goals": 2,
    "n_streams": 2, "n_source_steps": 60, "tf_n_layer": 1, "tf_n_head": 2, "tf_n_embd": 16,
    "tf_n_inner": 16, "tf_dropout": 0.0, "batch_size": 4, "n_updates": 12, "eval_every": 6,
    "eval_episodes": 4, "eval_rollouts": 2, "final_rollouts": 3, "n_warmup": 2, "device": "cpu",
}  # fmt: skip


RUN = "AD-darkroom-seed0"


def training(folder, **changed):
    argv = [ROOT / "train.py", "--checkpoints", folder, "--figs", folder / "figs"]
    for name, value in (TRAINING | changed).items():
        argv += ["--" + name.replace("_", "-"), value]
    return argv


def test_two_processes_train_as_one_on_the_same_batches(tmp_path):
    # Without averaging: an average over few updates would hide most of what they changed.
    jobs = [start(n, *training(tmp_path / str(n), ema_decay=0.0)) for n in (1, 2)]
    outputs = [finish(job)[0] for job in jobs]
    runs = [json.loads((tmp_path / str(n) / RUN / "training.json").read_text()) for n in (1, 2)]
    assert outputs[1].count("TEST GOALS") == 1
    for one, two in zip(runs[0]["log"], runs[1]["log"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["step"] == one["step"]
    names = [sorted(p.name for p in (tmp_path / str(n) / RUN).iterdir()) for n in (1, 2)]
    assert names[0] == names[1]
    for name in (name for name in names[0] if name.startswith("ckpt-")):
        one, two = (torch.load(tmp_path / str(n) / RUN / name)["model"] for n in (1, 2))
        for key in one:
            if key.endswith("in_proj_bias"):
                # A softmax does not see a bias of its keys: that gradient is rounding alone,
                # which Adam scales to full updates. Queries and values remain.
                one[key], two[key] = (torch.cat([x[key][:16], x[key][32:]]) for x in (one, two))
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_ends_the_training_job_with_a_clear_error(tmp_path):
    argv = training(tmp_path, n_updates=10**6, eval_every=10**6)
    job = start(2, *argv)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / RUN / "histories-test.npz").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = children(job.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, err = finish(job, code=1)
    assert "Signal 9 (SIGKILL) received" in err
    assert "rank      : 1" in err
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not (tmp_path / RUN / "training.json").exists()
