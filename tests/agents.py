"""Agents for tests: an AD transformer as it is, and one with planted attention."""

from collections import OrderedDict

import torch
from torch import nn

from historylens.agent import Agent


class ModelAgent(Agent):
    """An AD transformer through its own forward pass, in rooms if some are given."""

    facts, meta = {"Checkpoint": "tiny"}, {"checkpoint": "tiny"}
    title, identity = "tiny", {"model": "tiny"}

    def __init__(self, model, environment=None):
        config = model.config
        self.model, self.device = model, model.pred_action.weight.device
        self.decisions, self.n_max, self.environment = (), model.n_context_max, environment
        self.layers = [f"transformer_encoder.layers.{i}" for i in range(config.tf_n_layer)]
        self.n_heads = [config.tf_n_head] * config.tf_n_layer

    @torch.inference_mode()
    def act(self, history, positions=None):
        return self.model(*history.inputs, positions)


class Recorder(ModelAgent):
    """Keeps the histories and positions that it acts on; `weights` gives the query's `(B, n)`."""

    def __init__(self, n_max=7, logits=None, weights=None):
        self.model = nn.Sequential(OrderedDict(attention=Attention()))
        self.device, self.decisions = torch.device("cpu"), ()
        self.n_max, self.layers, self.n_heads = n_max, ["attention"], [1]
        self.histories, self.positions, self.looked = [], [], []
        self.logits = logits or (lambda history: torch.tensor([1e9, 0.0]).expand(history.size, -1))
        self.weights = weights or second_and_fourth

    def act(self, history, positions=None):
        self.histories.append(history)
        self.positions.append(positions)
        return self.logits(history)

    def forward(self, history):
        self.looked.append(history)
        own = self.weights(history)
        self.model(torch.cat([own, 1 - own.sum(dim=1, keepdim=True)], dim=1))
        return self.logits(history)


def second_and_fourth(history):
    time = torch.arange(history.n).expand(history.size, -1)
    return (time == 1) * 0.5 + (time == 3) * 0.2


class Attention(nn.Module):
    """Attends with given weights `(B, T)` of every query, whatever it is given."""

    def forward(self, weights):
        zeros = torch.zeros(len(weights), 1, weights.shape[1], 1)
        mask = weights.float().log()[:, None, None].expand(-1, -1, weights.shape[1], -1)
        return nn.functional.scaled_dot_product_attention(zeros, zeros, zeros, attn_mask=mask)
