"""The AD model and its four attention metrics, one number at a time, from a checkpoint's tensors.

The slow twin of everything between a checkpoint and `metrics.csv`: no torch module, no hook, no
batch. Each token is computed after the other in float64, as the formulas are written down.

    python tests/plain_model.py checkpoints/RUN/ckpt-4500.pt figs/attention/metrics.csv

recomputes every head average in `metrics.csv` and prints the largest difference of each metric.
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch

METRICS = ("mean_context_attention", "concentration", "entropy", "recent_distant_ratio")


def read_checkpoint(path):
    """Tensors by name in float64, and the flat config."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {name: t.numpy().astype(np.float64) for name, t in content["model"].items()}
    return tensors, content["config"]


def context_steps(step, n, stride, horizon):
    """Context of the decision at `step`: its own episode so far, then every stride-th back."""
    steps = list(range(step - step % horizon, step))
    episode = step // horizon - stride
    while len(steps) < n:
        assert episode >= 0, "the history does not reach back so far"
        steps = list(range(episode * horizon, (episode + 1) * horizon)) + steps
        episode -= stride
    return steps[len(steps) - n :]


def transition_token(tensors, config, state, action, reward, next_state):
    """`Linear([s, onehot(a), r, s'])`."""
    one_hot = [1.0 if action == a else 0.0 for a in range(config["num_actions"])]
    parts = np.array([*state, *one_hot, reward, *next_state], dtype=np.float64)
    return tensors["embed_context.weight"] @ parts + tensors["embed_context.bias"]


def layer_norm(x, weight, bias):
    """Zero mean and unit variance over the width, scaled and shifted."""
    mean = x.mean()
    variance = ((x - mean) ** 2).mean()
    return (x - mean) / math.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    """x times the normal distribution function of x."""
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def encoder_layer(tensors, number, x, n_heads):
    """One post-norm layer on tokens `(T, D)`: its output, and attention weights `(H, T, T)`."""

    def of(name):
        return tensors[f"transformer_encoder.layers.{number}.{name}"]

    n_tokens, width = x.shape
    size = width // n_heads
    w_q, w_k, w_v = np.split(of("self_attn.in_proj_weight"), 3)
    b_q, b_k, b_v = np.split(of("self_attn.in_proj_bias"), 3)
    queries = [w_q @ token + b_q for token in x]
    keys = [w_k @ token + b_k for token in x]
    values = [w_v @ token + b_v for token in x]
    weights = np.zeros((n_heads, n_tokens, n_tokens))
    out = []
    for i in range(n_tokens):
        mixed = np.zeros(width)
        for head in range(n_heads):
            part = slice(head * size, (head + 1) * size)
            scores = [queries[i][part] @ keys[j][part] / math.sqrt(size) for j in range(i + 1)]
            largest = max(scores)
            powers = [math.exp(score - largest) for score in scores]
            for j in range(i + 1):
                weights[head, i, j] = powers[j] / sum(powers)
                mixed[part] += weights[head, i, j] * values[j][part]
        attended = of("self_attn.out_proj.weight") @ mixed + of("self_attn.out_proj.bias")
        token = layer_norm(x[i] + attended, of("norm1.weight"), of("norm1.bias"))
        inner = gelu(of("linear1.weight") @ token + of("linear1.bias"))
        fed = of("linear2.weight") @ inner + of("linear2.bias")
        out.append(layer_norm(token + fed, of("norm2.weight"), of("norm2.bias")))
    return np.array(out), weights


def run_model(tensors, config, transitions, query_state):
    """Action logits `(A,)`, and the query token's attention row of each layer `(L, H, T)`.

    `transitions` is a list of (state, action, reward, next state), the oldest first.
    """
    tokens = [transition_token(tensors, config, *transition) for transition in transitions]
    row, col = query_state
    tokens.append(tensors["embed_query_state.weight"][row * config["grid_size"] + col])
    x = np.array([t + tensors["pos_embedding"][0, i] for i, t in enumerate(tokens)])
    rows = []
    for number in range(config["tf_n_layer"]):
        x, weights = encoder_layer(tensors, number, x, config["tf_n_head"])
        rows.append(weights[:, -1])
    return tensors["pred_action.weight"] @ x[-1] + tensors["pred_action.bias"], np.array(rows)


def four_metrics(row):
    """The four metrics of one attention row `(T,)`, the query token last."""
    p = [float(weight) for weight in row[:-1]]
    n = len(p)
    mean = sum(p) / n
    quarter = max(1, n // 4)
    distant, recent = sum(p[:quarter]) / quarter, sum(p[n - quarter :]) / quarter
    return {
        "mean_context_attention": mean,
        "concentration": math.sqrt(sum((weight - mean) ** 2 for weight in p) / n),
        "entropy": -sum(weight * math.log(weight + 1e-10) for weight in p),
        "recent_distant_ratio": recent / (distant + 1e-10),
    }


def decision(histories, history, step, stride, n):
    """Context and query state of one decision of an opened `histories-test.npz`."""
    chosen = context_steps(step, n, stride, int(histories["horizon"]))
    names = "states", "actions", "rewards", "next_states"
    parts = (histories[name][history, chosen].tolist() for name in names)
    return list(zip(*parts, strict=True)), histories["states"][history, step].tolist()


def recompute(checkpoint, csv_path, histories_path=None):
    """Recompute a `metrics.csv`.

    Returns a list of ((sample, layer, head), written, plain), the last two dicts of the metrics.
    """
    tensors, config = read_checkpoint(checkpoint)
    path = histories_path or Path(checkpoint).parent / "histories-test.npz"
    with np.load(path) as file:
        histories = {name: file[name] for name in file.files}
    compared, rows = [], {}
    with open(csv_path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            place = tuple(int(line[name]) for name in ("history", "step", "stride", "n_context"))
            if place not in rows:
                rows[place] = run_model(tensors, config, *decision(histories, *place))[1]
            heads = rows[place][int(line["layer"])]  # (H, T)
            row = heads.mean(axis=0) if line["head"] == "mean" else heads[int(line["head"])]
            written = {name: float(line[name]) for name in METRICS}
            key = (int(line["sample"]), int(line["layer"]), line["head"])
            compared.append((key, written, four_metrics(row)))
    return compared


if __name__ == "__main__":
    result = recompute(*sys.argv[1:])
    print(f"{len(result)} rows of {sys.argv[2]} recomputed from {sys.argv[1]}")
    for name in METRICS:
        absolute = max(abs(written[name] - plain[name]) for _, written, plain in result)
        relative = max(abs(written[name] / plain[name] - 1) for _, written, plain in result)
        print(f"{name:>24}: largest difference {absolute:.1e} (relative {relative:.1e})")
