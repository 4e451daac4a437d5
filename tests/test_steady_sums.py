"""Products of few rows, and what the commands write, do not depend on the number of threads."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from historylens.common.steady import SteadySums


@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
)
def test_linear_maps_of_few_rows_give_what_they_give_among_many(shape, widths, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, widths[0], generator=generator)
    weight = torch.randn(*widths[::-1], generator=generator)
    more = torch.randn(widths[1], generator=generator) if bias else None
    alone = functional.linear(x, weight, more)
    with SteadySums():
        steady = functional.linear(x, weight, more)
        whole = functional.linear(torch.cat([x.flatten(0, -2), torch.ones(64, widths[0])]), weight)
    assert steady.shape == alone.shape
    assert torch.allclose(steady, alone, atol=1e-5)
    if not bias:
        assert torch.equal(steady.flatten(0, -2), whole[: x.flatten(0, -2).shape[0]])


def test_linear_maps_of_other_kinds_are_what_they_are():
    x, weight = torch.ones(3, 5), torch.ones(5)
    nested = torch.nested.nested_tensor([torch.ones(2, 5), torch.ones(1, 5)])
    with SteadySums():
        assert functional.linear(x, weight).tolist() == [5, 5, 5]
        assert functional.linear(input=x, weight=weight[None]).tolist() == [[5]] * 3
        assert functional.linear(nested, weight[None].repeat(2, 1)).is_nested


def compiled(layer, x):
    torch.compiler.reset()
    return torch.compile(lambda x: layer(x) @ layer.weight, backend="eager", fullgraph=True)(x)


def into(layer, x):
    functional.linear(x, layer.weight.data, layer.bias.data, out=(out := torch.empty(3, 4)))
    return out


def changed_in_place(layer, x):
    with torch.no_grad():
        mapped = layer(x)
    return mapped.add_(torch.ones(4, requires_grad=True)) * mapped.untyped_storage().nbytes()


def recomputed(layer, x):
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    return torch.autograd.grad(checkpointed.square().sum(), layer.weight)[0]


class Wrapped:
    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*(x.x if isinstance(x, Wrapped) else x for x in args), **(kwargs or {}))


def packed(layer, x):
    quantized = nn.Sequential(torch.ao.quantization.QuantStub(), copy.deepcopy(layer)).eval()
    quantized.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(quantized, inplace=True)(x)
    return torch.ao.quantization.convert(quantized, inplace=True)(x).dequantize()


@pytest.mark.filterwarnings("ignore:.*(torch.ao|torch.jit|quantize|reduce_range|observer).*")
@pytest.mark.parametrize("run", [
    compiled, into, changed_in_place, recomputed, packed,
    lambda layer, x: torch.jit.trace(layer, x)(torch.ones(100, 5)),
    lambda layer, x: torch.fx.Tracer().trace(layer) and layer(x),
    lambda layer, x: functional.linear(Wrapped(x), layer.weight, layer.bias),
    lambda layer, x: functional.linear(x.to_sparse(), layer.weight),
    lambda layer, x: functional.linear(x, layer.weight, torch.ones(3, 4)),
])  # fmt: skip
def test_whatever_is_done_with_a_linear_map_can_be_done(run):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    alone = run(layer, x)
    with SteadySums():
        assert torch.allclose(run(layer, x), alone, atol=1e-5)


def test_operands_that_do_not_fit_are_told_as_they_are():
    with SteadySums(), pytest.raises(RuntimeError, match="3x5 and 4x2"):
        functional.linear(torch.ones(3, 5), torch.ones(2, 4))


@pytest.mark.parametrize("product", [torch.mm, torch.matmul, functional.linear])
def test_other_products_of_few_rows_run_on_one_thread_and_give_the_others_back(product):
    seen, before = [], torch.get_num_threads()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((func.__name__, torch.get_num_threads()))
            return func(*args, **(kwargs or {}))

    torch.set_num_threads(2)
    try:
        with Watch(), SteadySums():
            product(torch.ones(3, 5), torch.ones(5, 5, requires_grad=True))
            product(torch.ones(300, 5), torch.ones(5, 5))
            torch.bmm(torch.ones(2, 3, 5), torch.ones(2, 5, 5))
            with pytest.raises(RuntimeError):
                product(torch.ones(3, 5), torch.ones(4, 4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [n for name, n in seen if name in ("linear", "mm", "matmul", "bmm")] == [1, 2, 2, 1]


@pytest.mark.parametrize("flags", [(), ("--play", "--episodes=2", "--rollouts=1")])
def test_one_thread_and_more_give_the_same_bytes(tmp_path, flags):
    root, running = Path(__file__).parents[1], []
    flags += "--num-samples=4", "--num-figures=0", "--num-effects=4", "--device=cpu", "--out=out"
    shipped = f"--checkpoint={root / 'checkpoints' / 'AD-darkroom-shipped'}"
    for n in ("1", "2"):
        (home := tmp_path / n).mkdir()
        command = [sys.executable, root / "visualize_attention.py", shipped, *flags]
        options = {
            "cwd": home,
            "env": os.environ | {"OMP_NUM_THREADS": n, "OMP_WAIT_POLICY": "passive"},
        }
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, **options))
    assert [one.wait() for one in running] == [0, 0]
    written = {(tmp_path / n / "out" / "metrics.json").read_bytes() for n in ("1", "2")}
    assert len(written) == 1
