"""Weights that change between their softmax and the values: recorded as they meet, or refused."""

from operator import imul

import pytest
import torch
from eager import Given, causal, check, refused, run_twice, softmaxed
from eager import split_heads as split
from torch.nn import functional

from historylens import record_attention

LOWER = torch.ones(6, 6).tril()


def assigned(w):
    w[..., causal(6)] = 0
    return w


def renormalised(w):
    w = w * LOWER
    return w / w.sum(-1, keepdim=True)


def zeroed(change):
    """Weights changed in place through a view of them."""

    def changed(w):
        change(w)
        return w

    return changed


def beside(w):
    (w * (w + 1e-9).log()).sum()  # an entropy, which the values never meet
    w.mT @ torch.ones(6, 1)  # what each token receives
    (w > 0.2).float() @ torch.ones(6, 1)  # how many are strong
    return functional.dropout(w, 0.0).reshape(2, 2, 6, 6)


CHANGES = {
    "in place": lambda w: imul(w, LOWER),
    "filled": lambda w: functional.dropout(w.double().float(), 0.0).masked_fill(causal(6), 0),
    "assigned": assigned,
    "by a view": zeroed(lambda w: w.view(4, 6, 6).mul_(LOWER)),
    "by heads": zeroed(lambda w: [one.mul_(LOWER) for one in w.unbind(1)]),
    "by a part": zeroed(lambda w: imul(w[..., :2], LOWER[:, :2])),
    "by its own": zeroed(lambda w: w.detach().mul_(LOWER)),
    "renormalised": renormalised,
    "turned": lambda w: (w * LOWER).transpose(1, 2).contiguous().transpose(1, 2),
    "beside": beside,
    "mixed": lambda w: torch.einsum("bhij,hg->bgij", w, torch.tensor([[0.25, 1], [0.75, 2]])),
}


def changed(change, multiply):
    def forward(x):
        w = change(softmaxed(x))
        return torch.einsum("bhij,bhjd->bhid", w, split(x)) if multiply else w @ split(x)

    return Given(forward)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("multiply", [0, 1])
def test_weights_are_recorded_as_they_meet_the_values(change, multiply):
    x = torch.randn(2, 6, 8)
    found = run_twice(changed(CHANGES[change], multiply), x)[0]
    forbidden = causal(6) & (change not in ("beside", "mixed"))
    forbidden[:, 2 if change == "by a part" else 6 :] = False
    weights = CHANGES[change](softmaxed(x))
    check(found, (weights / weights.sum(-1, keepdim=True)).double(), forbidden)


def test_weights_that_fall_below_zero_are_refused():
    refused("Given: expected .*below 0", changed(lambda w: w - 0.5, 0), torch.randn(1, 4, 8))


FOLLOWED = {
    "values first": lambda w, v: (v.mT @ w.mT).mT,
    "each head": lambda w, v: torch.stack([x @ v[:, i] for i, x in enumerate(w.unbind(1))], 1),
    "dropped": lambda w, v: torch.dropout_(w.flatten(0, 1), 0.5, True).unflatten(0, (-1, 2)) @ v,
    "dropped beside": lambda w, v: (torch.dropout_(w.flatten(0, 1), 0.5, True), w @ v)[1],
    "joined": lambda w, v: torch.cat(w.split(1, 1), 1) @ v,
}
NOT_FOLLOWED = {
    "added": lambda w, v: (w[:, :1] - 0.5 * w[:, 1:]) @ v,
    "mixed last": lambda w, v: (
        functional.linear(w.permute(0, 2, 3, 1), torch.ones(2, 2)).permute(0, 3, 1, 2) @ v
    ),
    "mixed flat": lambda w, v: (torch.ones(2, 2) @ w.flatten(2)).unflatten(-1, w.shape[2:]) @ v,
    "by another product": lambda w, v: torch.linalg.matmul(w * LOWER, v),
    "averaged": lambda w, v: torch.einsum("bij,bhjd->bhid", w.mean(1), v),
}


@pytest.mark.parametrize("n_wide", [4, 6])  # of a head, in which 6 tokens meet as many axes
@pytest.mark.parametrize("product", [*FOLLOWED, *NOT_FOLLOWED])
def test_weights_that_cannot_be_followed_to_the_values_are_refused(product, n_wide):
    """What is beside the values may do as it likes."""
    x = torch.randn(3, 6, 2 * n_wide)

    def forward(x, is_beside=False):
        w, v = softmaxed(x), split(x)
        return (FOLLOWED | NOT_FOLLOWED)[product](w, v) + (w @ v if is_beside else 0)

    model, is_beside = Given(forward), product in NOT_FOLLOWED
    if is_beside:
        refused("^Given changes .*heads are mixed.*record_attention", model, x)
    record = run_twice(model, x, is_beside)
    check(record[0], softmaxed(x, torch.float64))


def test_weights_of_two_softmaxes_put_together_are_refused_and_may_be_handed_in():
    def forward(x, is_told=False):
        one, two = softmaxed(x), (-split(x) @ split(x).mT).softmax(-1)
        both = one + 0.5 * two
        if is_told:
            record_attention("both", both)
        return both @ split(x)

    model, x = Given(Given(forward)), torch.randn(2, 5, 8)
    refused("^inner changes .*record_attention", model, x)
    assert run_twice(model, x, True).names == ("both",)
