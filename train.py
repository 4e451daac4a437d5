"""Train an Algorithm Distillation model in Dark Room (Laskin et al. 2022, sections 3 and 4).

    python train.py                     # learning histories, training, evaluation
    python train.py --resume            # go on after an interruption: same result as without it
    python train.py --seed 1            # another run, beside the first

Writes `checkpoints/RUN/`: a `ckpt-STEP.pt` whenever the return on the validation goals is a new
best (so the highest step is the one to use), `histories-test.npz`, `training.json` with all the
numbers, and until it is finished `resume.pt`. Draws `figs/training/RUN.png`.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from checkpoint import (
    HISTORIES_NAME,
    checkpoints_in,
    load_checkpoint,
    pick_device,
    read_file,
    save_checkpoint,
)
from config import (
    EnvConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    add_flags,
    from_flags,
    run_command,
    to_dict,
)
from darkroom import split_goals
from dataset import ADDataset, packed_queries
from evaluation import describe, score
from model import ADTransformer
from rollout import Sliding, rollout
from source import learning_histories, relative_return

RESUME_NAME = "resume.pt"
LOG_NAME = "training.json"
N_TEST_STREAMS = 8  # learning histories a test goal that are kept beside the checkpoint
N_TRAIN_GOALS_EVALUATED = 6


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    env: EnvConfig
    source: SourceConfig
    model: ModelConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """All settings in one flat dict, as checkpoints hold them."""
        return to_dict(self.env, self.source, self.model, self.train)


class Trainer:
    """A model in training, and everything needed to go on with it exactly."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        train, env = settings.train, settings.env
        self.settings, self.device = settings, device
        self.goals = split_goals(
            env.goal_seed, env.grid_size, env.n_test_goals, env.n_validation_goals
        )
        histories = learning_histories(self.goals["train"], env, settings.source, train.seed)
        self.source_return = relative_return(histories, slice(-20, None), env.grid_size)
        self.dataset = ADDataset(histories, settings.model.n_transit - 1, train.max_stride)
        self.rng = np.random.default_rng(train.seed)
        torch.manual_seed(train.seed)
        self.model = ADTransformer(settings.model).to(device)
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay)
        )
        self.optimizer = make_optimizer(self.model, train)
        self.lr_sched = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, train.n_warmup, train.n_updates)
        )
        holds_two_episodes = self.model.n_context_max >= 2 * env.horizon
        self.slidings: list[Sliding] = ["step", "episode"] if holds_two_episodes else ["step"]
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # since the last evaluation
        self.log: list[dict[str, Any]] = []

    def update(self) -> None:
        """One gradient update on one batch of windows."""
        started = time.perf_counter()
        batch = self.dataset.sample(self.settings.train.batch_size, self.rng)
        loss = packed_loss(self.model.train(), {k: v.to(self.device) for k, v in batch.items()})
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.max_grad_norm)
        self.optimizer.step()
        self.lr_sched.step()
        self.averaged.update_parameters(self.model)
        self.step += 1
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - started

    def evaluate(
        self, goals: np.ndarray, n_rollouts: int, sliding: Sliding, label: str
    ) -> np.ndarray:
        """Rewards an episode `(G, n_rollouts, E)` of the averaged weights on `goals` `(G, 2)`."""
        train = self.settings.train
        returns = rollout(
            self.averaged.module,
            np.repeat(goals, n_rollouts, axis=0),
            train.eval_episodes,
            seed=train.seed,
            horizon=self.settings.env.horizon,
            sliding=sliding,
            progress=label,
        )
        return returns.reshape(len(goals), n_rollouts, -1)

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, as plain types and tensors."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.settings.to_dict(),
            "model": self.averaged.module.state_dict(),
            "n_averaged": self.averaged.n_averaged,
            "training_model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_sched": self.lr_sched.state_dict(),
            "goals": {name: goals.tolist() for name, goals in self.goals.items()},
            "rng": {"numpy": self.rng.bit_generator.state, "torch": torch.get_rng_state()},
            "rng_cuda": cuda,
            "losses": self.losses,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.log = state["losses"], state["log"]
        self.averaged.module.load_state_dict(state["model"])
        self.averaged.n_averaged.copy_(state["n_averaged"])
        self.model.load_state_dict(state["training_model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_sched.load_state_dict(state["lr_sched"])
        self.rng.bit_generator.state = state["rng"]["numpy"]
        torch.set_rng_state(state["rng"]["torch"])
        if state["rng_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])


def packed_loss(model: ADTransformer, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of the source's actions, the mean over all prefixes of all windows."""
    queries, targets = packed_queries(batch)
    context = (batch[name] for name in ("states", "actions", "rewards", "next_states"))
    logits = model.forward_packed(*context, queries)  # (B, n + 1, A)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.99))


def lr_factor(step: int, n_warmup: int, n_updates: int) -> float:
    """Part of the peak learning rate: linear warm-up, then half a cosine down to a twentieth."""
    warmup = min(1.0, (step + 1) / max(1, n_warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_updates)))
    return warmup * (0.05 + 0.95 * cosine)


def train(settings: Settings, run: Path, device: torch.device, resume: bool) -> Trainer:
    """Train until the last update, keeping the checkpoints that validate best in `run`."""
    trainer = Trainer(settings, device)
    if resume:
        trainer.load_state_dict(read_file(run / RESUME_NAME))
    else:
        test = learning_histories(
            trainer.goals["test"],
            settings.env,
            settings.source,
            settings.train.seed + 1,
            N_TEST_STREAMS,
        )
        run.mkdir(parents=True, exist_ok=True)
        test.save(run / HISTORIES_NAME)
    n_updates, eval_every = settings.train.n_updates, settings.train.eval_every
    bar = tqdm(total=n_updates, initial=trainer.step, desc="training", unit="update")
    try:
        while trainer.step < n_updates:
            trainer.update()
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(trainer.losses[-100:]):.3f}", refresh=False)
            if trainer.step % eval_every == 0 or trainer.step == n_updates:
                keep_if_best(trainer, run)
    except KeyboardInterrupt:
        save_checkpoint(run / RESUME_NAME, trainer.state_dict())
        bar.close()
        print(f"Stopped at update {trainer.step}. Go on with the same command and --resume.")
        raise
    bar.close()
    return trainer


def keep_if_best(trainer: Trainer, run: Path) -> None:
    """Evaluate; keep the model as a checkpoint if it is the best so far on validation goals."""
    started = time.perf_counter()
    loss = float(np.mean(trainer.losses))
    trainer.losses = []
    entry: dict[str, Any] = {"step": trainer.step, "loss": loss}
    for name in ("train", "validation"):
        goals, n_rollouts = trainer.goals[name], trainer.settings.train.eval_rollouts
        if name == "train":  # spread over the room; fewer rollouts, as nothing is chosen by them
            goals = goals[np.linspace(0, len(goals) - 1, N_TRAIN_GOALS_EVALUATED).astype(int)]
            n_rollouts = max(1, n_rollouts // 4)
        sliding = trainer.slidings[-1]  # the fastest
        returns = trainer.evaluate(goals, n_rollouts, sliding, f"acting on {name} goals")
        entry |= {
            f"{name}_{key}": value
            for key, value in score(trainer.settings.env, goals, returns).items()
        }
    best = max((past["validation_relative"] for past in trainer.log), default=-1.0)
    entry["best"] = entry["validation_relative"] > best
    trainer.log.append(entry)
    trainer.seconds += time.perf_counter() - started
    state = trainer.state_dict()
    if entry["best"]:
        kept = {key: state[key] for key in ("step", "config", "model", "goals")}
        save_checkpoint(
            run / f"ckpt-{trainer.step}.pt", kept | {"optimizer": None, "lr_sched": None}
        )
    save_checkpoint(run / RESUME_NAME, state)
    tqdm.write(
        f"update {trainer.step:>6,}  loss {loss:.3f}  reward an episode, episodes "
        f"{trainer.settings.train.eval_episodes // 2 + 1} to {trainer.settings.train.eval_episodes}"
        f": train goals {entry['train_return']:.1f} of {entry['train_possible']:.1f}, validation "
        f"goals {entry['validation_return']:.1f} of {entry['validation_possible']:.1f}"
        f"{'  (kept)' if entry['best'] else ''}"
    )


def finish(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Evaluate the chosen checkpoint on the test goals and write `training.json`."""
    chosen = load_checkpoint(checkpoints_in(run)[-1], trainer.device)
    trainer.averaged.module.load_state_dict(chosen.model.state_dict())
    goals = trainer.goals["test"]
    n_rollouts = trainer.settings.train.final_rollouts
    returns = {
        sliding: trainer.evaluate(goals, n_rollouts, sliding, f"acting on test goals, {sliding}")
        for sliding in trainer.slidings
    }
    result = {
        "config": trainer.settings.to_dict(),
        "chosen_step": chosen.step,
        "seconds": round(trainer.seconds, 1),
        "source_relative_return": trainer.source_return,
        "test": score(trainer.settings.env, goals, returns["step"]),
        "test_by_sliding": {
            sliding: score(trainer.settings.env, goals, r)["return"]
            for sliding, r in returns.items()
        },
        "log": trainer.log,
    }
    part = run / f".{LOG_NAME}.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(run / LOG_NAME)
    (run / RESUME_NAME).unlink(missing_ok=True)
    return result


def make_parser() -> argparse.ArgumentParser:
    """The flags: one a setting of `config.py`, and where the run lives."""
    parser = argparse.ArgumentParser(
        description="Train an Algorithm Distillation model in Dark Room: learning histories of a "
        "source algorithm, a transformer that imitates them, and its evaluation in context.",
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: AD-ENV-seedSEED)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--checkpoints", metavar="DIR", default="checkpoints", help="where runs lie"
    )
    parser.add_argument("--figs", metavar="DIR", default="figs", help="where pictures go")
    add_flags(parser, TrainConfig, SourceConfig, EnvConfig, ModelConfig)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train, evaluate, save."""
    flags = make_parser().parse_args(argv)
    settings = Settings(*(from_flags(c, flags) for c in Settings.__annotations__.values()))
    run = Path(flags.checkpoints) / (flags.run or f"AD-{flags.env}-seed{flags.seed}")
    device = pick_device(flags.device)
    begun = (run / RESUME_NAME).exists()
    if flags.resume and not begun:
        raise UserError(f"nothing to resume: {run} holds no interrupted run")
    if not flags.resume and (begun or checkpoints_in(run)):
        raise UserError(
            f"{run} holds a run already, which is not overwritten: "
            f"{'go on with it by --resume, or ' if begun else ''}name another with --run"
        )
    if flags.resume:
        saved = read_file(run / RESUME_NAME)["config"]
        changed = [k for k, v in settings.to_dict().items() if saved.get(k) != v]
        if changed:
            raise UserError(
                f"--resume goes on with the settings of {run}: expected "
                f"--{changed[0].replace('_', '-')} {saved.get(changed[0])}, "
                f"got {settings.to_dict()[changed[0]]}"
            )
    trainer = train(settings, run, device, flags.resume)
    result = finish(trainer, run)
    from learning_curve import draw_learning_curve  # matplotlib takes a second to import

    picture = Path(flags.figs) / "training" / f"{run.name}.png"
    draw_learning_curve(result, picture)
    print(describe(result, checkpoints_in(run)[-1]))
    print(f"All numbers: {run / LOG_NAME}, learning curves: {picture}")


if __name__ == "__main__":
    run_command(main)
