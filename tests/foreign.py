"""A run and histories as existing Dark Room code for Algorithm Distillation writes them.

From these two files alone to action logits, token by token: `foreign_logits`.
"""

import random
from pathlib import Path

import h5py
import numpy as np
import plain_model
import torch

from ad.darkroom import all_goals
from ad.source import learning_histories
from config import EnvConfig, SourceConfig
from dataset import CONTEXT

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "AD-darkroom-shipped"


def make_foreign_run(folder, weights=None, n_steps=400, n_streams=2, step=1000):
    """Write a run of the shipped weights, or of a tiny model's in a room of 5 x 5.

    Returns the run's folder and its HDF5 file, which has `n_streams` histories of every cell.
    """
    n_heads, grid_size, horizon = (4, 9, 20) if weights is None else (2, 5, 5)
    if weights is None:
        (path,) = SHIPPED.glob("ckpt-*.pt")
        weights = torch.load(path, weights_only=True)["model"]
    _, n_transit, width = weights["pos_embedding"].shape
    config = {  # its tf_n_inner is wrong
        "env": "darkroom", "grid_size": grid_size, "horizon": horizon, "dim_states": 2,
        "num_actions": 5, "n_transit": n_transit, "tf_n_embd": width,
        "tf_n_layer": sum(name.endswith("norm1.bias") for name in weights), "tf_n_head": n_heads,
        "tf_n_inner": 8 * width + 1, "tf_dropout": 0.1, "env_split_seed": 0,
        "train_env_ratio": 0.9, "train_source_timesteps": 1000, "alg": "PPO", "alg_seed": 42,
        "label_smoothing": 0.0, "mixed_precision": "fp32", "log_dir": None,
        "device": torch.device("cuda:0"),
    }  # fmt: skip
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(2)}
    group = {"lr": 3e-4, "betas": (0.9, 0.99), "foreach": None, "params": [0]}
    optimizer = {"state": {0: moments}, "param_groups": [group]}
    schedule = {"base_lrs": [3e-4], "last_epoch": step, "lr_lambdas": [{}]}
    content = {"step": step, "config": config, "model": weights}
    run = Path(folder) / "runs" / "AD-darkroom-seed0"
    file = Path(folder) / "datasets" / "history_darkroom_PPO_alg-seed42.hdf5"
    for path in (run, file.parent):
        path.mkdir(parents=True)
    torch.save(content | {"optimizer": optimizer, "lr_sched": schedule}, run / f"ckpt-{step}.pt")
    write_hdf5(file, grid_size, horizon, n_steps, n_streams)
    return run, file


def write_hdf5(path, grid_size, horizon, n_steps, n_streams):
    """Learning histories of all cells, time first, floats, the state after the reset at the end."""
    env = EnvConfig(grid_size=grid_size, horizon=horizon)
    source = SourceConfig(n_source_steps=n_steps)
    learned = learning_histories(all_goals(grid_size), env, source, seed=0, n_streams=n_streams)
    dones = np.arange(n_steps) % horizon == horizon - 1
    next_states = np.where(dones[:, None], grid_size // 2, learned.next_states)
    arrays = vars(learned) | {"next_states": next_states}
    arrays = {name: arrays[name].astype(np.float32) for name in CONTEXT}
    arrays["actions"] = learned.actions.astype(np.int64)
    arrays["dones"] = np.tile(dones, (len(learned.actions), 1))
    with h5py.File(path, "w") as file:
        for cell in range(grid_size**2):
            for name, values in arrays.items():
                own = values[cell * n_streams : (cell + 1) * n_streams]
                file[f"{cell}/{name}"] = own.swapaxes(0, 1)


def held_out(seed, ratio, n_cells=81):
    """Group names that such code does not train on, in its order."""
    random.seed(seed)
    cells = list(range(n_cells))
    random.shuffle(cells)
    return cells[round(n_cells * ratio) :]


def foreign_logits(checkpoint, file, cell, stream, step):
    """Action logits `(A,)` of the decision at `step` of a stream, from the two files alone."""
    tensors, config = plain_model.read_checkpoint(checkpoint)
    before = slice(step - config["n_transit"] + 1, step)
    with h5py.File(file, "r") as opened:
        group = {name: values[:, stream] for name, values in opened[str(cell)].items()}
    transitions = list(zip(*(group[name][before] for name in CONTEXT), strict=True))
    query = group["states"][step].astype(int)
    return torch.from_numpy(plain_model.run_model(tensors, config, transitions, query)[0]).float()
