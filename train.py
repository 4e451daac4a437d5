"""Train an Algorithm Distillation model in Dark Room (Laskin et al. 2022, sections 3 and 4).

    python train.py                     # learning histories, training, evaluation
    python train.py --resume            # go on after an interruption: same result as without it
    python train.py --seed 1            # another run, beside the first
    torchrun --nproc-per-node 4 train.py     # data-parallel: the same batches, shared out

Writes `checkpoints/RUN/`: a `ckpt-STEP.pt` whenever the return on the validation goals is a new
best (so the highest step is the one to use), `histories-test.npz`, `training.json` with all the
numbers, and until it is finished `resume.pt`. Draws `figs/training/RUN.png`.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
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
    read_file,
    save_checkpoint,
)
from config import (
    run_command,
)
from darkroom import split_goals
from dataset import ADDataset, packed_queries
from model import ADTransformer
from parallel import ALONE, Group, join
from rollout import Sliding, rollout
from source import learning_histories, relative_return
from training.evaluation import describe, score
from training.optimisation import lr_factor, make_optimizer
from training.runs import RESUME_NAME, Settings, make_parser, prepare
from training.thinning import draw_batch

LOG_NAME = "training.json"
N_TEST_STREAMS = 8  # learning histories a test goal that are kept beside the checkpoint
N_TRAIN_GOALS_EVALUATED = 6


class Trainer:
    """A model in training, and everything needed to go on with it exactly."""

    def __init__(self, settings: Settings, device: torch.device, group: Group = ALONE) -> None:
        train, env = settings.train, settings.env
        self.settings, self.device, self.group = settings, device, group
        self.goals = split_goals(
            env.goal_seed, env.grid_size, env.n_test_goals, env.n_validation_goals
        )
        histories = learning_histories(self.goals["train"], env, settings.source, train.seed)
        self.dataset = ADDataset(histories, settings.model.n_transit - 1, train.max_stride)
        self.source_return = relative_return(histories, slice(-20, None), env.grid_size)
        self.rng = np.random.default_rng(train.seed)
        torch.manual_seed(train.seed)
        self.model = ADTransformer(settings.model).to(device)
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay)
        )
        self.objective = group.averaging(PackedLoss(self.model), device)
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
        """One gradient update on one batch of windows, of which each process takes its part."""
        started = time.perf_counter()
        train, group = self.settings.train, self.group
        batch = draw_batch(self.dataset, train.batch_size, train.history_dropout, self.rng)
        own = group.equal_slice(len(batch["actions"]))
        if group.size > 1:  # dropout of its own for each process, and nothing to save for a resume
            torch.manual_seed(hash((train.seed, self.step, group.rank)))
        loss = self.objective({k: v[own].to(self.device) for k, v in batch.items()})
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), train.max_grad_norm)
        self.optimizer.step()
        self.lr_sched.step()
        self.averaged.update_parameters(self.model)
        self.step += 1
        self.losses.append(group.mean(loss.item()))
        self.seconds += time.perf_counter() - started

    @property
    def must_evaluate(self) -> bool:
        """Whether an evaluation is due that has not been made."""
        train = self.settings.train
        due = self.step > 0 and (self.step % train.eval_every == 0 or self.step == train.n_updates)
        return due and (not self.log or self.log[-1]["step"] < self.step)

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


class PackedLoss(nn.Module):
    """`packed_loss` of a model in training, as a module whose gradients can be averaged."""

    def __init__(self, model: ADTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a batch of windows."""
        return packed_loss(self.model.train(), batch)


def packed_loss(model: ADTransformer, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of the source's actions, the mean over all prefixes of all windows."""
    queries, targets = packed_queries(batch)
    context = (batch[name] for name in ("states", "actions", "rewards", "next_states"))
    logits = model.forward_packed(*context, queries)  # (B, n + 1, A)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(
    settings: Settings, run: Path, device: torch.device, resume: bool, group: Group = ALONE
) -> Trainer:
    """Train until the last update; rank 0 keeps the checkpoints that validate best in `run`."""
    with group.together(), group.told_once():
        trainer = Trainer(settings, device, group)
    if resume:
        trainer.load_state_dict(group.broadcast(group.is_main and read_file(run / RESUME_NAME)))
    elif group.is_main:
        test = learning_histories(
            trainer.goals["test"],
            settings.env,
            settings.source,
            settings.train.seed + 1,
            N_TEST_STREAMS,
        )
        run.mkdir(parents=True, exist_ok=True)
        test.save(run / HISTORIES_NAME)
    try:
        update_to_the_end(trainer, run)
    except KeyboardInterrupt:
        if group.is_main:
            save_checkpoint(run / RESUME_NAME, trainer.state_dict())
            print(f"Stopped at update {trainer.step}. Go on with the same command and --resume.")
        raise
    return trainer


def update_to_the_end(trainer: Trainer, run: Path) -> None:
    """The updates that are left, and the evaluations between them, which are rank 0's."""
    n_updates, is_main = trainer.settings.train.n_updates, trainer.group.is_main
    with tqdm(
        total=n_updates,
        initial=trainer.step,
        desc="training",
        unit="update",
        disable=not is_main,
    ) as bar:
        while trainer.step < n_updates or trainer.must_evaluate:
            if trainer.must_evaluate:
                if is_main:
                    keep_if_best(trainer, run)
                else:
                    trainer.losses, trainer.log = [], [{"step": trainer.step}]
                trainer.group.barrier()
                continue
            with undivided():
                trainer.update()
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(trainer.losses[-100:]):.3f}", refresh=False)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Put Ctrl-C off until the block is done, so that what it changes is changed as a whole."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def keep_if_best(trainer: Trainer, run: Path) -> None:
    """Evaluate; keep the model as a checkpoint if it is the best so far on validation goals."""
    started = time.perf_counter()
    entry: dict[str, Any] = {"step": trainer.step, "loss": float(np.mean(trainer.losses))}
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
    with undivided():
        trainer.log.append(entry)
        trainer.losses = []
        trainer.seconds += time.perf_counter() - started
        save(trainer, run)
    tqdm.write(progress_line(entry, trainer.settings.train.eval_episodes))


def save(trainer: Trainer, run: Path) -> None:
    """Write what a resume needs, and a checkpoint if the last evaluation was the best."""
    state = trainer.state_dict()
    if trainer.log[-1]["best"]:
        kept = {key: state[key] for key in ("step", "config", "model", "goals")}
        kept |= {"optimizer": None, "lr_sched": None}
        save_checkpoint(run / f"ckpt-{trainer.step}.pt", kept)
    save_checkpoint(run / RESUME_NAME, state)


def progress_line(entry: dict[str, Any], n_episodes: int) -> str:
    """An evaluation as one line of console text."""
    return (
        f"update {entry['step']:>6,}  loss {entry['loss']:.3f}  reward an episode, episodes "
        f"{n_episodes // 2 + 1} to {n_episodes}"
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


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train, evaluate, save."""
    with join() as group:
        with group.told_once():
            flags = make_parser().parse_args(argv)
        with group.together():
            settings, run, device = prepare(flags, group)
        trainer = train(settings, run, device, flags.resume, group)
        if group.is_main:
            report(trainer, run, Path(flags.figs) / "training" / f"{run.name}.png")


def report(trainer: Trainer, run: Path, picture: Path) -> None:
    """Evaluate what was trained, draw its learning curve, print the numbers."""
    result = finish(trainer, run)
    from training.learning_curve import draw_learning_curve  # matplotlib takes a second to import

    draw_learning_curve(result, picture)
    print(describe(result, checkpoints_in(run)[-1]))
    print(f"All numbers: {run / LOG_NAME}, learning curves: {picture}")


if __name__ == "__main__":
    run_command(main)
