"""A model of the user's as something to analyse, and as something that acts on any history.

    subject = AdaptedSubject.of(load_adapter("my_model.py"), n=10, seed=0, device=device)
    subject.forward([0, 1])                            # (2, A), through the adapter's act()

Building it runs the model once and checks that adapter and model fit each other: what is wrong is
told in one line before anything is written.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acting.views import N_LAST_ROWS, ModelView
from adapter.decisions import read_decisions
from adapter.file import Adapter, Decision, kind
from attention.calls import CaptureError
from attention.capture import capture
from attention.record import LayerAttention, Record
from attention.samples import Sample
from attention.tokens import NONE, PADDING, Tokens, sum_rows
from compression import History
from config import UserError

CAPTURE = ("softmax", "heads")  # arguments of capture that an adapter may give
MAX_LOOKED = 2**25  # attention weights held at once by a look: all layers, heads, rows and columns


@dataclass(frozen=True)
class AdaptedSubject:
    """A model that an adapter gives, and decisions of its samples.

    Attributes:
        adapter: the user's file.
        model: its model, in evaluation mode.
        decisions: what to analyse.
        device: where the model lies.
        layers: names of what attends, in the order in which it runs.
        n_heads: heads of each layer.
        options: further arguments of `capture`.
    """

    adapter: Adapter
    model: nn.Module
    decisions: Sequence[Decision]
    device: torch.device
    layers: Sequence[str] = ()
    n_heads: Sequence[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter, n: int, seed: int, device: torch.device) -> "AdaptedSubject":
        """Load model and samples, and run the model once.

        Raises:
            UserError: something raises, is missing, or does not fit.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an untrained model is the same in each process and run
            model = adapter.call("load")
        if not isinstance(model, nn.Module):
            raise adapter.wrong("load()", "a torch.nn.Module", kind(model))
        with adapter.blamed(f"moving the model to {device}"):
            model = model.to(device).eval()
        subject = cls(adapter, model, read_decisions(adapter, n, seed), device)
        return subject.tried()

    def tried(self) -> "AdaptedSubject":
        """The same with its layers, after a pass that shows whether adapter and model fit.

        Raises:
            UserError: they do not.
        """
        _ = self.n_max
        same = [i for i in range(self.n_samples) if self.shape(i) == self.shape(0)][:2]
        maps = self.tokens(same)
        tried = replace(self, options=self._capture_options())
        try:
            record = tried._one_pass(same, where_of(maps))
        except UserError as error:
            if not isinstance(error.__cause__, CaptureError) or not where_of(maps):
                raise
            tried._check_length(tried._one_pass(same, {}), maps)  # the map misled capture
            raise
        tried._check_length(record, maps)
        names = tuple(layer.name for layer in record)
        return replace(tried, layers=names, n_heads=tuple(x.query_rows.shape[1] for x in record))

    def _one_pass(self, indices: Sequence[int], where: dict[str, Any]) -> Record:
        with (
            self.adapter.blamed("act()"),
            torch.inference_mode(),
            capture(self.model, received=False, **where, **self.options) as record,
        ):
            self._act(self.history(indices))
        return record

    def _check_length(self, record: Record, maps: Sequence[Tokens]) -> None:
        """Compare the tokens that are attended over with those of the map."""
        for layer in record:
            n_tokens = layer.query_rows.shape[-1]
            if n_tokens != len(maps[0]):
                raise self.adapter.wrong(
                    "tokens()" if self.adapter.has("tokens") else "no tokens(), so",
                    f"a map of the {n_tokens} tokens that {layer.name} attends over (with "
                    f"{self.decisions[0].n} transitions before the decision)",
                    f"one of {len(maps[0])} tokens",
                )

    def _capture_options(self) -> dict[str, Any]:
        """Arguments of capture that the adapter gives: its CAPTURE, and its layers() by name."""
        options = getattr(self.adapter.module, "CAPTURE", {})
        if not isinstance(options, dict) or not set(options) <= set(CAPTURE):
            raise self.adapter.wrong(
                "CAPTURE", f"a dict with {' and '.join(CAPTURE)}", repr(options)
            )
        if not self.adapter.has("layers"):
            return dict(options)
        layers = self.adapter.call("layers", self.model)
        layers = [layers] if isinstance(layers, str) else layers
        if not isinstance(layers, list | tuple | nn.ModuleList) or not len(layers):
            raise self.adapter.wrong("layers()", "a list of modules or their names", kind(layers))
        known = {module: name for name, module in self.model.named_modules()}
        for layer in layers:
            if not isinstance(layer, str) and layer not in known:
                raise self.adapter.wrong("layers()", "modules of the model", kind(layer))
        return options | {"layers": [known.get(layer, layer) for layer in layers]}

    @contextmanager
    def captured(
        self, layers: Sequence[int], indices: Sequence[int], **wanted: Any
    ) -> Iterator[list[LayerAttention]]:
        """Capture the attention of some layers in a pass over some decisions."""
        with self._captured(layers, self.tokens(indices), **wanted) as found:
            yield found

    @contextmanager
    def _captured(
        self, layers: Sequence[int], tokens: Sequence[Tokens], **wanted: Any
    ) -> Iterator[list[LayerAttention]]:
        names = [self.layers[number] for number in layers]
        options = dict(self.options)
        if not any("#" in name for name in names):  # several calls of one module are told by number
            options["layers"] = names
        found: list[LayerAttention] = []
        with capture(self.model, **where_of(tokens), **options, **wanted) as record:
            yield found
        by_name = {layer.name: layer for layer in record}
        found += [by_name[name] for name in names]

    @property
    def n_samples(self) -> int:
        """Number of decisions."""
        return len(self.decisions)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of the longest decision."""
        longest = max(range(self.n_samples), key=lambda i: self.decisions[i].n)
        return len(self.tokens([longest])[0])

    def shape(self, index: int) -> int:
        """Transitions before a decision: those with equally many can share a pass."""
        return self.decisions[index].n

    def sample(self, index: int) -> Sample:
        """What a reader must know about a decision."""
        decision = self.decisions[index]
        changes = np.flatnonzero(np.diff(decision.episodes)) + 1
        return Sample(
            index=index,
            title=decision.title or f"sample {index}",
            n_context=decision.n,
            episode_starts=np.append(0, changes),
            rewarded=np.asarray(decision.rewards) > 0,
            labels=dict(decision.labels),
            tokens=self.tokens([index])[0],
        )

    def forward(self, indices: Sequence[int]) -> Tensor:
        """Action logits `(B, A)` of some decisions."""
        with self.adapter.blamed("act()"):
            return self._act(self.history(indices))

    def history(self, indices: Sequence[int]) -> History:
        """What lies before some of the decisions, on the model's device."""
        chosen = [self.decisions[i] for i in indices]

        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(d, name) for d in chosen])).to(self.device)

        known = {}
        if all(decision.task is not None for decision in chosen):
            known["tasks"] = torch.tensor([decision.task for decision in chosen])
        return History(
            *(stacked(name) for name in ("states", "actions", "rewards", "next_states")),
            query_states=stacked("query_state"),
            episodes=stacked("episodes"),
            **known,
        )

    def tokens(self, indices: Sequence[int]) -> list[Tokens]:
        """What each token of some decisions is; a map each.

        Raises:
            UserError: there is none, or it does not fit the history.
        """
        return self.tokens_of(self.history(indices))

    def tokens_of(self, history: History) -> list[Tokens]:
        """What each token of a batch of histories is; a map each."""
        if not self.adapter.has("tokens"):
            return [Tokens.of(history.n)] * history.size
        maps = self.adapter.call("tokens", history)
        maps = [maps] * history.size if isinstance(maps, Tokens) else maps
        is_list = isinstance(maps, list | tuple) and len(maps) == history.size
        if not is_list or not all(isinstance(one, Tokens) for one in maps):
            raise self.adapter.wrong(
                "tokens()", f"a Tokens, or a list of one for each of {history.size}", kind(maps)
            )
        if any(one.n != history.n or len(one) != len(maps[0]) for one in maps):
            one = next(one for one in maps if one.n != history.n or len(one) != len(maps[0]))
            raise self.adapter.wrong(
                "tokens()",
                f"a map of {history.n} transitions, equally long for the whole batch",
                f"one of {one.n} transitions and {len(one)} tokens",
            )
        return list(maps)

    @property
    def facts(self) -> dict[str, str]:
        """The model and what it reads, in words."""
        heads = sorted(set(self.n_heads))
        n_parameters = sum(p.numel() for p in self.model.parameters())
        lengths = sorted({decision.n for decision in self.decisions})
        tokens = self.tokens([max(range(self.n_samples), key=self.shape)])[0]
        n = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        each = ", ".join(tokens.parts) if len(tokens.parts) > 1 else "one token"
        return {
            "Model": f"{type(self.model).__name__}: {len(self.layers)} layers x "
            f"{' or '.join(map(str, heads))} heads, {n_parameters:,} parameters",
            "Context length": f"{n} transitions, {len(tokens)} tokens at most; a transition is "
            f"{each}; token {tokens.decides} decides; metrics are of whole transitions",
        }

    @cached_property
    def view(self) -> ModelView:
        """The model, acting on any history."""
        return ModelView(self.n_max, self.logits, self.look, device=self.device)

    @cached_property
    def n_max(self) -> int:
        """Transitions that the model can read: the adapter's N_MAX, or those of the samples.

        Raises:
            UserError: it is no such number, or a sample has more.
        """
        longest = max(range(self.n_samples), key=self.shape)
        n_max = getattr(self.adapter.module, "N_MAX", self.shape(longest))
        if not isinstance(n_max, int) or n_max < 1:
            raise self.adapter.wrong(
                "N_MAX", "a whole number, the transitions that the model can read", repr(n_max)
            )
        if self.shape(longest) > n_max:
            name = f"samples()[{longest}]"
            got = str(self.shape(longest))
            raise self.adapter.wrong(name, f"at most N_MAX = {n_max} transitions", got)
        return n_max

    @torch.inference_mode()
    def logits(self, history: History) -> Tensor:
        """Action logits `(B, A)` on any history that the model can read."""
        with self.adapter.blamed("act()"):
            return self._act(history)

    def _act(self, history: History) -> Tensor:
        """Run the model on a batch, and check what comes back."""
        logits = self.adapter.module.act(self.model, history)
        is_fit = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == history.size
        if not is_fit or not logits.shape[1]:
            expected = f"action logits of shape ({history.size}, A) for {history.size} histories"
            raise self.adapter.wrong("act()", expected, kind(logits))
        if not logits.isfinite().all():
            raise self.adapter.wrong("act()", "finite logits", "some that are not")
        return logits

    @torch.inference_mode()
    def look(self, history: History, wanted: Collection[str]) -> dict[str, Tensor]:
        """Attention to a history, averaged over layers and heads: fields of a `History`.

        Rows and columns of a transition's tokens count as one: columns are summed, rows averaged.

        Args:
            history: up to `n_max` transitions before each of `B` decisions.
            wanted: some of `acting.views.LOOKS`.
        """
        whole = set(wanted) - {"query_attention"}
        tokens = len(self.tokens_of(history.rows(torch.zeros(1, dtype=torch.long)))[0])
        size = max(1, MAX_LOOKED // (tokens**2 * sum(self.n_heads))) if whole else history.size
        parts = [
            self._look(history.rows(rows), wanted, bool(whole))
            for rows in torch.arange(history.size, device=history.device).split(size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in wanted}

    def _look(self, history: History, wanted: Collection[str], whole: bool) -> dict[str, Tensor]:
        maps = self.tokens_of(history)
        options = {"maps": range(history.size), "map_size": max(8, len(maps[0]))} if whole else {}
        every = range(len(self.layers))
        with (
            self.adapter.blamed("act()"),
            self._captured(every, maps, received=False, **options) as record,
        ):
            self._act(history)
        found = {}
        if "query_attention" in wanted:
            rows = sum(layer.query_rows.double().mean(1) for layer in record) / len(record)
            found["query_attention"] = sum_rows(rows.numpy(), maps)[..., :-1]
        if whole:
            weights = sum(layer.maps.nan_to_num().double().mean(1) for layer in record)
            rows = _among_transitions(weights.numpy() / len(record), maps)  # (B, n, n)
            found |= {"received": rows.sum(1), "last_rows": rows[:, -N_LAST_ROWS:]}
        return {name: torch.from_numpy(found[name]).float().to(history.device) for name in wanted}


def _among_transitions(weights: np.ndarray, maps: Sequence[Tokens]) -> np.ndarray:
    """Attention of transitions to transitions `(B, n, n)` from that of tokens `(B, T, T)`.

    The row of the token that decides counts only where it belongs to a transition.
    """
    columns = sum_rows(weights, maps)[..., :-1]  # (B, T, n)
    rows = sum_rows(columns.swapaxes(1, 2), maps)[..., :-1].swapaxes(1, 2)  # (B, n, n)
    counts = [np.bincount(one.transition[one.transition != NONE]) for one in maps]
    return rows / np.stack(counts)[:, :, None]


def where_of(maps: Sequence[Tokens]) -> dict[str, Any]:
    """Arguments of capture that say which token decides and which are padding, where it matters."""
    found: dict[str, Any] = {}
    if any(one.decides != len(one) - 1 for one in maps):
        found["query"] = torch.tensor([one.decides for one in maps])
    if any(PADDING in one.part for one in maps):
        found["padding"] = torch.tensor([[p == PADDING for p in one.part] for one in maps])
    return found
