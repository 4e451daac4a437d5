"""What a model does when something in it is changed: passes beside the one that is recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

from historylens.capture.record import Options, matches
from historylens.capture.session import Session, names_of, uncompiled

SMALLEST_CHANGE = 1e-4  # of the largest output, that counts as one


def mixing_modules(
    model: nn.Module, layers: Sequence[str], n_tokens: int, run: Callable[[], object]
) -> dict[str, str]:
    """Modules that mix tokens beside the captured `layers`, and their classes.

    While `run()` runs the model, each module that reads `(B, T, D)`, and neither is, contains nor
    lies in a layer or a module found, is called again with another token: it mixes if the output at
    the rest changes. What fails then is passed over.
    """
    names, found, busy = names_of({"": model}), {}, []

    def probe(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        name = names.get(module)
        if busy or name is None or module is model:
            return
        if not any(matches(x, name) or matches(name, x) for x in (*layers, *found)):
            busy.append(name)
            with suppress(Exception):
                if _mixes(module, args, kwargs, output, n_tokens):
                    found[name] = type(module).__name__
            busy.clear()

    with ExitStack() as after, uncompiled():
        handle = after.enter_context(modules.register_module_forward_hook(probe, with_kwargs=True))
        after.callback(modules._global_forward_hooks_with_kwargs.pop, handle.id)  # PyTorch does not
        run()
    return found


def _mixes(module: nn.Module, args: tuple, kwargs: dict, output: Any, n_tokens: int) -> bool:
    """Whether the output at a token depends on another token of the first input."""
    given = {**dict(enumerate(args)), **kwargs}
    place, x = next((key, x) for key, x in given.items() if isinstance(x, Tensor))

    def again(x: Tensor) -> Tensor:
        again = deepcopy(given) | {place: x.clone()}  # a cache is not to grow from call to call
        return _first(module(*[again.pop(i) for i in range(len(args))], **again))

    output = _first(output)
    axis = next((i for i in (1, 0) if x.shape[i] == n_tokens), None)
    is_fit = x.dim() == output.dim() == 3 and axis is not None and x.is_floating_point()
    if not is_fit or x.shape[2] == n_tokens or output.shape[axis] != n_tokens:
        return False  # (B, D, T) cannot be told from (B, T, D) where D = T
    limit = SMALLEST_CHANGE * output.abs().max()
    output = again(x)
    if (again(x) - output).abs().max() > limit:
        return False  # it is not the same twice
    for token in {0, n_tokens // 2}:
        other = x.clone()
        other.select(axis, token).neg_().add_(1)
        moved = (again(other) - output).abs().movedim(axis, 0).flatten(1).amax(1)  # (T,)
        moved[token] = 0
        if moved.max() > limit:
            return True
    return False


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class _Disturbed(Session):
    target: str
    row: int | None

    def __torch_function__(self, *call: Any) -> Any:
        output = super().__torch_function__(*call)
        if self.newest != self.target:
            return output
        is_pair = isinstance(output, tuple)  # of multi_head_attention_forward, (T, B, D) first
        changed = _first(output).clone()
        rows = changed if is_pair else changed.movedim(-2, 0)
        if self.row is not None:
            row = self.row - self.record.calls[self.target].n_queries + len(rows)  # of this pass
            rows = rows[max(row, 0) : max(row + 1, 0)]
        rows.neg_().add_(1)
        return (changed, *output[1:]) if is_pair else changed


@contextmanager
def disturbed(model: nn.Module, layer: str, row: int | None, **options: Any) -> Iterator[None]:
    """A block in which a row of what a layer's attention gives is another; all rows for None."""
    session = _Disturbed(model, Options(received=False, **options))
    session.target, session.row = layer, row
    with session.attached():
        yield
