"""A run and histories as existing Dark Room code for Algorithm Distillation writes them.

    run, file = make_foreign_run(tmp_path)      # runs/AD-darkroom-seed0, datasets/history_....hdf5

and that code's own way from such a file to action logits, as a slow twin: `foreign_logits`.
"""

import random
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

from config import EnvConfig, SourceConfig
from ad.darkroom import all_goals, start_state
from ad.source import learning_histories

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "AD-darkroom-shipped"


def foreign_config(weights, n_heads, grid_size=9, horizon=20):
    """The flat config that such code stores, for weights of our own; its tf_n_inner is wrong."""
    n_layers = sum(name.endswith("norm1.bias") for name in weights)
    return {
        "env": "darkroom",
        "grid_size": grid_size,
        "horizon": horizon,
        "dim_states": 2,
        "num_actions": 5,
        "n_transit": weights["pos_embedding"].shape[1],
        "tf_n_embd": weights["pos_embedding"].shape[2],
        "tf_n_layer": n_layers,
        "tf_n_head": n_heads,
        "tf_n_inner": 8 * weights["pos_embedding"].shape[2] + 1,
        "tf_dropout": 0.1,
        "env_split_seed": 0,
        "train_env_ratio": 0.9,
        "train_source_timesteps": 1000,
        "alg": "PPO",
        "alg_seed": 42,
        "label_smoothing": 0.0,
        "mixed_precision": "fp32",
        "log_dir": None,
        "device": torch.device("cuda:0"),
    }


def make_foreign_run(
    folder, weights=None, n_heads=4, grid_size=9, horizon=20, n_steps=400, n_streams=2, step=1000
):
    """Write a run and its HDF5 file; weights are those of the shipped run unless given.

    Returns the run's folder and the file, which has `n_streams` histories of every cell.
    """
    if weights is None:
        (path,) = SHIPPED.glob("ckpt-*.pt")
        weights = torch.load(path, weights_only=True)["model"]
    config = foreign_config(weights, n_heads, grid_size, horizon)
    run = Path(folder) / "runs" / f"AD-darkroom-seed{config['env_split_seed']}"
    run.mkdir(parents=True, exist_ok=True)
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(2)}
    group = {"lr": 3e-4, "betas": (0.9, 0.99), "foreach": None, "params": [0]}
    content = {
        "step": step,
        "config": config,
        "model": weights,
        "optimizer": {"state": {0: moments}, "param_groups": [group]},
        "lr_sched": {"base_lrs": [3e-4], "last_epoch": step, "lr_lambdas": [{}]},
    }
    torch.save(content, run / f"ckpt-{step}.pt")
    file = Path(folder) / "datasets" / "history_darkroom_PPO_alg-seed42.hdf5"
    file.parent.mkdir(exist_ok=True)
    write_hdf5(file, grid_size, horizon, n_steps, n_streams)
    return run, file


def write_hdf5(path, grid_size, horizon, n_steps, n_streams, seed=0):
    """Learning histories of all cells, time first, floats, the state after the reset at the end."""
    env = EnvConfig(grid_size=grid_size, horizon=horizon)
    source = SourceConfig(n_source_steps=n_steps)
    learned = learning_histories(all_goals(grid_size), env, source, seed, n_streams)
    dones = np.arange(n_steps) % horizon == horizon - 1
    next_states = np.where(dones[:, None], start_state(grid_size), learned.next_states)
    with h5py.File(path, "w") as file:
        for cell in range(grid_size**2):
            own = slice(cell * n_streams, (cell + 1) * n_streams)
            group = file.create_group(str(cell))
            group["states"] = learned.states[own].swapaxes(0, 1).astype(np.float32)
            group["actions"] = learned.actions[own].T.astype(np.int64)
            group["rewards"] = learned.rewards[own].T.astype(np.float32)
            group["next_states"] = next_states[own].swapaxes(0, 1).astype(np.float32)
            group["dones"] = np.repeat(dones[:, None], n_streams, axis=1)


def held_out(seed, ratio, n_cells=81):
    """Group names that such code does not train on, in its order."""
    random.seed(seed)
    cells = list(range(n_cells))
    random.shuffle(cells)
    return cells[round(n_cells * ratio) :]


class ForeignAD(nn.Module):
    """Such code's model, as far as it decides: post-norm encoder layers one after the other."""

    def __init__(self, config, width_inner):
        super().__init__()
        width = config["tf_n_embd"]
        self.grid_size, self.n_actions = config["grid_size"], config["num_actions"]
        self.pos_embedding = nn.Parameter(torch.zeros(1, config["n_transit"], width))
        layer = nn.TransformerEncoderLayer(
            width, config["tf_n_head"], width_inner, activation="gelu", batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, config["tf_n_layer"], enable_nested_tensor=False
        )
        self.embed_context = nn.Linear(2 * config["dim_states"] + self.n_actions + 1, width)
        self.embed_query_state = nn.Embedding(self.grid_size**2, width)
        self.pred_action = nn.Linear(width, self.n_actions)

    def forward(self, states, actions, rewards, next_states, query_states):
        one_hot = torch.eye(self.n_actions)[actions]
        context = torch.cat([states, one_hot, rewards[..., None], next_states], dim=-1)
        cells = (query_states * torch.tensor([self.grid_size, 1])).sum(dim=-1).long()
        tokens = [self.embed_context(context), self.embed_query_state(cells)[:, None]]
        x = torch.cat(tokens, dim=1)
        n_tokens = x.shape[1]
        x = x + self.pos_embedding[:, :n_tokens]
        mask = torch.triu(torch.full((n_tokens, n_tokens), float("-inf")), diagonal=1)
        for layer in self.transformer_encoder.layers:
            x = layer(x, src_mask=mask)
        return self.pred_action(x[:, -1])


def foreign_logits(checkpoint, file, cell, stream, step):
    """Action logits `(A,)` of the decision at `step` of a stream, from the two files alone."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config, weights = content["config"], content["model"]
    inner = weights["transformer_encoder.layers.0.linear1.bias"].shape[0]
    model = ForeignAD(config, inner).eval()
    model.load_state_dict(weights)
    n = config["n_transit"] - 1
    with h5py.File(file, "r") as opened:
        group = opened[str(cell)]
        window = [
            torch.from_numpy(group[name][()].swapaxes(0, 1)[stream : stream + 1, step - n : step])
            for name in ("states", "actions", "rewards", "next_states")
        ]
        query = torch.from_numpy(group["states"][()].swapaxes(0, 1)[stream : stream + 1, step])
    with torch.no_grad():
        return model(*window, query)[0]
