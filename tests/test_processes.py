"""Work shared over processes and cut to fit memory gives what one process gives at once."""

import contextlib
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from apart import run_apart
from conftest import (
    ad_agent,
    files_of,
    make_histories,
    sharp_model,
    without_drawing,
    write_checkpoint,
)
from hypothesis import given
from hypothesis import strategies as st
from test_compare_compression import timeless
from test_train import flags, numbers_of, run_of
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import LaunchConfig, elastic_launch

import compare_compression
import historylens.comparison
import train
import visualize_attention
from ad import training
from historylens.analysis import AnalysisConfig, Job, job, results
from historylens.analysis.results import measure, measure_drawn
from historylens.common.batches import even_parts
from historylens.common.errors import UserError, expect
from historylens.common.processes import ALONE, Group, join
from historylens.metrics import NAMES, Metrics

N_SAMPLES = 12
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.fixture
def agent(tiny_model):
    return ad_agent(tiny_model, make_histories(), [(i % 3, 11 + i, 1) for i in range(N_SAMPLES)])


@pytest.fixture
def analysed(agent):
    """Gives metrics (S, L, H + 1, M) and the samples drawn by some ranks of one job."""

    def run(n_drawn, ranks=(ALONE,), **settings):
        job = Job.of(agent, AnalysisConfig(num_figures=n_drawn, **settings), ALONE)
        metrics, drawn = Metrics(N_SAMPLES, job.layers, job.heads), []
        for rank in ranks:
            measure(replace(job, group=rank), metrics)
            drawn += measure_drawn(replace(job, group=rank), metrics)[0][1]
        return metrics.gather(ALONE).values, drawn

    return run


@given(start=st.integers(0, 9), n=st.integers(0, 60), size=st.integers(2, 20))
def test_shares_and_even_parts_are_all_items_once_and_differ_by_one_at_most(start, n, size):
    ranks = [Group(rank, size) for rank in range(size)]
    shares = [rank.share(n) for rank in ranks]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    own = [list(rank.share(n)) for rank in ranks]
    with (
        mock.patch.object(Group, "gather", return_value=own),
        mock.patch.object(Group, "broadcast", lambda _, value: value),
    ):
        assert ranks[-1].all_of(n, own[-1]) == list(range(n))
    slices = [rank.equal_slice(n * size) for rank in ranks]
    assert slices == [slice(rank * n, (rank + 1) * n) for rank in range(size)]
    with pytest.raises(UserError, match=f"{size} processes can share evenly, got {n * size + 1}"):
        ranks[0].equal_slice(n * size + 1)
    most = size - 1  # down to one
    parts = even_parts(start, start + n, most)
    assert list(itertools.chain(*parts)) == list(range(start, start + n))
    assert len(parts) == -(-n // most)
    lengths = [len(part) for part in parts] or [0]
    assert max(lengths) <= min(most, min(lengths) + 1)


@pytest.mark.parametrize(("size", "n_drawn"), [(3, 5), (13, N_SAMPLES)])
def test_ranks_measure_every_sample_to_the_bit_and_draw_once(analysed, monkeypatch, size, n_drawn):
    monkeypatch.setattr(results, "MAX_TOKENS", 4 * 12)
    monkeypatch.setattr(job, "MAX_DRAWN", 3)
    for name in ("barrier", "together"):  # ranks run in turn, none waits for another
        monkeypatch.setattr(Group, name, contextlib.nullcontext)
    together, drawn = analysed(n_drawn, [Group(rank, size) for rank in range(size)])
    alone, _ = analysed(n_drawn)
    np.testing.assert_array_equal(together, alone)
    assert sorted(drawn) == list(range(n_drawn))


def limit_batches(model, monkeypatch, most, error=CUDA):
    """Let forward passes of more than `most` samples fail; gives the sizes tried."""
    forward, sizes = model.forward, []

    def limited(states, *rest):
        sizes.append(len(states))
        if len(states) > most:
            raise error
        return forward(states, *rest)

    monkeypatch.setattr(model, "forward", limited)
    return sizes


def test_a_batch_beyond_memory_is_halved_with_a_note(analysed, agent, monkeypatch, capsys):
    expected, _ = analysed(7)
    sizes = limit_batches(agent.model, monkeypatch, 3)
    capsys.readouterr()
    found, drawn = analysed(7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert drawn == list(range(7))
    assert sum(size for size in sizes if size <= 3) == N_SAMPLES  # each is measured once
    assert len([size for size in sizes if size > 3]) <= 6
    said = capsys.readouterr().err  # one note of those drawn, one of the rest
    assert said.count("note: ") == said.count("does not fit the memory of cpu") == 2
    limit_batches(agent.model, monkeypatch, 0)
    with pytest.raises(UserError, match="a single sample of 12 tokens does not fit"):
        analysed(0)


def test_only_a_lack_of_memory_halves_a_batch(analysed, agent, monkeypatch):
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")
    for error in (CUDA, MemoryError(), cublas, real.value):
        sizes = limit_batches(agent.model, monkeypatch, 10, error)
        analysed(0)
        assert len(sizes) > 1
    for error in (ValueError("not enough memory"), RuntimeError("shapes cannot be multiplied")):
        sizes = limit_batches(agent.model, monkeypatch, 10, error)
        with pytest.raises(type(error)):
            analysed(0)
        assert len(sizes) == 1


def test_bfloat16_moves_the_metrics_a_little(analysed):
    full, half = (analysed(5, precision=name)[0] for name in ("float32", "bfloat16"))
    assert full.dtype == half.dtype == np.float64
    share = NAMES.index("normalised_entropy")
    assert 0 < np.abs(full - half)[..., share].max() < 0.1
    mean, on_self = (half[..., NAMES.index(x)] for x in ("mean_context_attention", "mass_self"))
    np.testing.assert_allclose(11 * mean + on_self, 1, atol=1e-6)


@pytest.mark.parametrize("env", [{}, {"WORLD_SIZE": "1"}])
def test_one_process_is_no_group_and_half_a_torchrun_or_too_few_gpus_are_an_error(monkeypatch, env):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.setattr(os, "environ", env)
    module = torch.nn.Linear(2, 2)
    with join() as group:
        assert group == ALONE
        assert (group.gather("a"), group.broadcast("a"), group.mean(3.5)) == (["a"], "a", 3.5)
        group.barrier()
        assert group.averaging(module, torch.device("cpu")) is module
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK is not set"), join():
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="at most 2 processes on this machine"):
        Group(2, 3, local_rank=2).device(torch.device("cuda"))
    with pytest.raises(UserError, match="got cuda:0"):
        Group(0, 3).device(torch.device("cuda:0"))
    assert Group(2, 3, local_rank=2).device(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.device(torch.device("cuda:1")) == torch.device("cuda:1")


COMMON = ["--device=cpu", "--checkpoint=run"]
ANALYSIS = [*COMMON, "--num-samples=12", "--num-figures=2", "--num-effects=2", "--out=out"]
# Without averaging: an average over few updates would hide most of what they changed.
TRAINING = {"ema_decay": 0.0, "tf_dropout": 0.0, "n_updates": 6, "eval_every": 3}
RACE = [  # 3 goals of 4 seeds: a look after 2
    *COMMON, "--strategies", "recent", "random", "top-k", "--budgets", "3", "6", "--episodes=4",
    "--margin=0.1", "--confirm=3", "--out=race",
]  # fmt: skip


def stopped(run, *args):
    """What stops a process, in its words; "" if nothing does."""
    try:
        run(*args)
    except (UserError, SystemExit) as error:
        return str(error)
    return ""


def work_together():
    """What each of two processes does in the folder: exchange, analyse, compare, train, die."""
    torch.cuda.is_available = lambda: False  # what is forked cannot use it
    without_drawing(pytest.MonkeyPatch())
    signal.alarm(120)  # rather than wait for ever for another one
    results.MAX_TOKENS, kept = 48, []

    def fail_on(ranks):
        with group.together():
            expect(group.rank not in ranks, "a mistake")

    def work(item, see):  # none takes a second one of a spread before each has taken one
        part = "bad" if item == "bad" else "good"
        group.store.set(f"{part} {group.rank}", "works")
        group.store.wait([f"{part} {rank}" for rank in range(group.size)])
        until = time.monotonic() + 20
        while group.is_main and not kept and time.monotonic() < until:
            see()  # what the other one has finished is kept while this one works
        expect(kept or group.rank, "nothing is kept in time")
        expect(item != "bad" or group.rank, "a bad item")
        return item, group.rank

    with join() as group:
        seen = {"gathered": group.gather(group.rank * 10), "mean": group.mean(group.rank + 1.0)}
        seen |= {"broadcast": group.broadcast({"from": group.rank}), "pid": os.getpid()}
        seen["together"] = [stopped(fail_on, ranks) for ranks in ((0, 1), (1,), ())]
        group.spread("abcdef", work, kept.append)
        seen |= {"kept": kept, "stopped": stopped(group.spread, ["bad"] * 9, work, id)}
        with group.told_once():
            print("told")
        Path(f"{group.rank}.json").write_text(json.dumps(seen))
        for module in (historylens.analysis, historylens.comparison, train):
            module.join = lambda: contextlib.nullcontext(group)  # one can join once
        visualize_attention.main(ANALYSIS)
        compare_compression.main(RACE)
        train.main(flags(Path("two"), **TRAINING))
        if group.rank == 1:
            training.PackedLoss.forward = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        train.main(flags(Path("killed"), n_updates=300))


def torchrun(_):
    """Two processes as torchrun starts them, but forked."""
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    options = {"start_method": "fork", "max_restarts": 0, "monitor_interval": 0.1, **place}
    try:
        elastic_launch(LaunchConfig(1, 1, 2, **options), work_together)()
    except ChildFailedError as error:
        print(error)
        sys.exit(1)


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_config):
    """What two processes left and said that worked together until one was killed."""
    folder = tmp_path_factory.mktemp("together") / "home"
    goals = [[0, 1], [2, 2], [4, 3]]
    write_checkpoint(folder / "run" / "ckpt-30.pt", sharp_model(tiny_config), goals)
    make_histories(n_episodes=25, horizon=4).save(folder / "run" / "histories-test.npz")
    done = run_apart(torchrun, [], folder)
    assert done.out.count("TEST GOALS") == 1, done.err
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    pids = [one.pop("pid") for one in seen]
    return SimpleNamespace(folder=folder, done=done, seen=seen, pids=pids)


def test_two_processes_exchange_values_and_stop_together(together):
    kept, *others = (one.pop("kept") for one in together.seen)
    assert sorted(item for item, _ in kept) == [*"abcdef"]  # each once
    assert {rank for _, rank in kept} == {0, 1}
    assert others == [[]]
    both = {"mean": 1.5, "broadcast": {"from": 0}}
    first = {"gathered": [0, 10], "together": ["a mistake", "2", ""], "stopped": "a bad item"}
    second = {"gathered": None, "together": ["2", "a mistake", ""], "stopped": "2"}
    assert together.seen == [both | first, both | second]
    assert together.done.out.count("told") == 1


@pytest.fixture
def alone(together, tmp_path, monkeypatch, undrawn):
    """A folder with the same run, to work in alone."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(together.folder / "run")
    return tmp_path


def test_two_processes_write_what_one_writes(together, alone, monkeypatch):
    monkeypatch.setattr(results, "MAX_TOKENS", 48)  # three passes to share
    visualize_attention.main(ANALYSIS)
    one, two = (files_of(folder / "out") for folder in (alone, together.folder))
    assert one == two
    assert len(json.loads(two["metrics.json"])["samples"]) == 12
    assert "cpu, 2 processes" in together.done.out
    assert together.done.err.count("4 steps; the checkpoint was trained on 5") == 1
    assert together.done.out.count("OVERALL ATTENTION STATISTICS") == 1


def test_two_processes_compare_as_one_to_the_byte(together, alone, capsys):
    compare_compression.main(RACE)
    one, two = timeless(alone / "race"), timeless(together.folder / "race")
    assert one == two
    assert {"results.json", "confirmation.json", "index.html"} <= one.keys()
    said, console = (" ".join(x.split()) for x in (capsys.readouterr().out, together.done.out))
    assert said.partition("COMPRESSED AGAINST")[2] in console
    assert "Racing: " in said
    assert console.count("Processes: 2 share the work") == 1


def test_two_processes_train_as_one_on_the_same_batches(together, tmp_path):
    train.main(flags(tmp_path, **TRAINING))
    runs = [run_of(folder) for folder in (tmp_path, together.folder / "two")]
    whole, shared = map(numbers_of, runs)
    assert shared["test"] == whole["test"]  # they share the rooms, too
    for one, two in zip(whole["log"], shared["log"], strict=True):
        assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
        assert two == one
    assert files_of(runs[0]).keys() == files_of(runs[1]).keys()
    for name in (path.name for path in runs[0].glob("ckpt-*")):
        one, two = (torch.load(run / name)["model"] for run in runs)
        for key in (key for key in one if key.endswith("in_proj_bias")):
            # A softmax does not see a bias of its keys: that gradient is rounding alone,
            # which Adam scales to full updates. Queries and values remain.
            one[key].chunk(3)[1].copy_(two[key].chunk(3)[1])
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_a_killed_process_ends_the_job_with_a_clear_error(together):
    done, lost = together.done, "error: rank 0 lost another of the 2 processes of this job, which"
    assert done.code == 1
    assert lost in done.err or "Signal 9 (SIGKILL) received" in done.out  # what is noticed first
    for pid in together.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [*files_of(run_of(together.folder / "killed"))] == ["histories-test.npz", "resume.pt"]
