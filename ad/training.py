"""Train an AD model on learning histories, choose a checkpoint by validation goals, evaluate it.

An interrupted run goes on to the result that it would have had. What is written: see `train.py`.

    settings, run, device = prepare(flags)                     # checked, before any work
    result = finish(train(settings, run, device, resume=False), run)    # what training.json holds
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ad import checkpoints
from ad.acting import Reads, Sliding, rollout_goals
from ad.evaluation import possible, progress_line, score
from ad.sizes import check_sizes, goals_of
from ad.source import learning_histories, relative_return
from ad.thinning import draw_batch
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from dataset import CONTEXT, ADDataset
from historylens.agent import pick_device
from historylens.common.errors import expect, note, told, undivided
from historylens.common.files import set_aside, write_atomically
from historylens.common.processes import ALONE, Group
from historylens.common.reading import printable
from historylens.common.settings import flag_of, from_flags, to_dict
from model import ADTransformer

LOG_NAME, RESUME_NAME = "training.json", "resume.pt"
N_TEST_STREAMS = 8  # learning histories a test goal that are kept beside the checkpoint
N_TRAIN_GOALS_EVALUATED = 6


class Settings(NamedTuple):
    """Everything that a run depends on."""

    env: EnvConfig = EnvConfig()
    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


def prepare(flags: argparse.Namespace, group: Group = ALONE) -> tuple[Settings, Path, torch.device]:
    """Settings, folder and device of a run; UserError before any work where they cannot be."""
    settings = Settings(*(from_flags(type(default), flags) for default in Settings()))
    group.equal_slice(settings.train.batch_size)
    thins = settings.train.history_dropout and settings.model.n_transit < 2
    expect(not thins, "expected --n-transit of at least 2 for --history-dropout to thin, got 1")
    check_sizes(*settings)
    device = group.device(pick_device(flags.device))
    name = f"AD-{settings.env.env}-seed{flags.seed}" if flags.run is None else flags.run
    is_plain = name.isprintable() and name not in ("", ".", "..") and not {*"/\\"} & {*name}
    what = "expected --run to be the plain name of a folder, of at most 200 bytes, got"
    expect(is_plain and len(name.encode()) <= 200, f"{what} {printable(repr(name), 300)}")
    what = "expected --checkpoints and --figs not to be empty"
    expect(flags.checkpoints and flags.figs, what)
    run = Path(flags.checkpoints) / name
    if group.is_main:
        _check_run(run, settings, flags.resume)
        for folder, flag in ((run, "--checkpoints"), (Path(flags.figs) / "training", "--figs")):
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            is_ours = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
            expect(is_ours, f"cannot write to {folder}: choose another folder with {flag}")
    return settings, run, device


def _check_run(run: Path, settings: Settings, resume: bool) -> None:
    """Refuse to overwrite a run, and to go on with one that there is not or that differs."""
    begun = (run / RESUME_NAME).exists()
    if not resume:
        expect(
            not begun and not checkpoints.checkpoints_in(run),
            f"{run} holds a run already, which is not overwritten: "
            f"{'go on with it by --resume, or ' if begun else ''}name another with --run",
        )
        return
    expect(begun, f"nothing to resume: {run} holds no interrupted run")
    try:
        saved = checkpoints.read_file(run / RESUME_NAME)["config"]
        saved = to_dict(*Settings()) | saved  # it may be older than a setting
    except Exception:  # damaged: `train` sets it aside
        return
    for name, value in to_dict(*settings).items():
        expect(
            saved[name] == value,
            f"--resume goes on with the settings of {run}: expected {flag_of(name)} "
            f"{saved[name]}, got {value}",
        )


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, train.lr, betas=(0.9, 0.99), weight_decay=train.weight_decay)


def lr_factor(step: int, n_warmup: int, n_updates: int) -> float:
    """Part of the peak learning rate: linear warm-up, then half a cosine down to a twentieth."""
    warmup = min(1.0, (step + 1) / max(1, n_warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_updates)))
    return warmup * (0.05 + 0.95 * cosine)


class PackedLoss(nn.Module):
    """Cross-entropy in nats of the source's actions, the mean over all prefixes of all windows.

    A module, so that its gradients can be averaged over processes.
    """

    def __init__(self, model: ADTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a batch of windows, as `ADDataset` describes it."""
        inputs = map(batch.get, (*CONTEXT, "query_states"))
        logits = self.model.forward_packed(*inputs)  # (B, q, A)
        targets = batch["target_actions"].flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets)


class Trainer:
    """A model in training, and everything needed to go on with it exactly."""

    def __init__(self, settings: Settings, device: torch.device, group: Group = ALONE) -> None:
        env, source, model, train = settings
        self.settings, self.device, self.group = settings, device, group
        self.goals = goals_of(env)
        histories = learning_histories(self.goals["train"], env, source, train.seed)
        self.dataset = ADDataset(
            histories, model.n_transit - 1, train.max_stride, train.random_episodes
        )
        self.source_return = relative_return(histories, slice(-20, None), env)
        self.rng = np.random.default_rng(train.seed)
        torch.manual_seed(train.seed)
        self.model = ADTransformer(model).to(device)
        ema = get_ema_multi_avg_fn(train.ema_decay)
        self.averaged = AveragedModel(self.model, multi_avg_fn=ema)
        self.objective = group.averaging(PackedLoss(self.model), device)
        self.optimizer = make_optimizer(self.model, train)
        self.lr_sched = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, train.n_warmup, train.n_updates)
        )
        models = {"model": self.averaged.module, "training_model": self.model}
        self.modules = models | {"optimizer": self.optimizer, "lr_sched": self.lr_sched}
        holds_two_episodes = self.model.n_context_max >= 2 * env.horizon
        self.slidings: list[Sliding] = ["step", "episode"] if holds_two_episodes else ["step"]
        self.step, self.started = 0, time.perf_counter()
        self.losses: list[float] = []  # since the last evaluation
        self.log: list[dict[str, Any]] = []  # an entry an evaluation

    def update(self) -> None:
        """One gradient update on one batch of windows, of which each process takes its part."""
        train, group = self.settings.train, self.group
        history_dropout = train.history_dropout * self.step / train.n_updates
        batch = draw_batch(self.dataset, train.batch_size, history_dropout, self.rng)
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

    def evaluate(self, goals: np.ndarray, n: int, reads: Reads, label: str) -> dict[str, Any]:
        """Numbers of the averaged weights, as `score` gives them, in `n` rollouts a goal."""
        env, train, rooms = self.settings.env, self.settings.train, np.repeat(goals, n, axis=0)
        options = train.eval_episodes, train.seed, env.horizon, reads, label, env.env, self.group
        returns = rollout_goals(self.averaged.module, rooms, *options)
        return score(env, goals, returns.reshape(len(goals), n, -1))

    def validate(self) -> dict[str, Any]:
        """An entry of the log: return on training and validation goals, whether it is the best.

        So is one at most a standard error below the best so far: then more training decides
        (the one standard error rule of Breiman et al. 1984), and no lucky draw of rollouts.
        """
        entry: dict[str, Any] = {"step": self.step, "loss": float(np.mean(self.losses))}
        train, n_rollouts = self.goals["train"], self.settings.train.eval_rollouts
        train = train[possible(self.settings.env, train) > 0]
        spread = train[np.linspace(0, len(train) - 1, N_TRAIN_GOALS_EVALUATED).astype(int)]
        of_validation, full = (self.goals["validation"], n_rollouts), self.slidings[-1]
        cases = {  # nothing is chosen by the return on training goals
            "train": (spread, max(1, n_rollouts // 4), full),
            "validation": (*of_validation, full),
        }
        if self.settings.train.history_dropout:  # it is to bear compressed history as well
            cases["compressed"] = (*of_validation, "compressed")
        for name, case in cases.items():
            numbers = self.evaluate(*case, f"acting on {name} goals")
            entry |= {f"{name}_{key}": value for key, value in numbers.items()}
        chosen_by = [name for name in cases if name != "train"]
        entry["score"] = float(np.mean([entry[f"{name}_relative"] for name in chosen_by]))
        errors = [entry[f"{name}_relative_error"] for name in chosen_by]
        entry["score_error"] = float(np.linalg.norm(errors) / len(errors))
        # Runs begun before there was a score were chosen by validation goals alone.
        scores = [past.get("score", past["validation_relative"]) for past in self.log]
        least = max(scores, default=-1.0) - entry["score_error"]
        is_sound = not self.log or math.isfinite(entry["loss"])  # the first is kept in any case
        return entry | {"best": entry["score"] >= least and is_sound}

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, as plain types and tensors."""
        return {
            "step": self.step,
            "seconds": time.perf_counter() - self.started,
            "config": to_dict(*self.settings),
            **{name: part.state_dict() for name, part in self.modules.items()},
            "n_averaged": self.averaged.n_averaged,
            "goals": {name: goals.tolist() for name, goals in self.goals.items()},
            "rng": {"numpy": self.rng.bit_generator.state, "torch": torch.get_rng_state()},
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "losses": self.losses,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.step, self.started = state["step"], time.perf_counter() - state["seconds"]
        self.losses, self.log = state["losses"], state["log"]
        for name, part in self.modules.items():
            part.load_state_dict(state[name])
        self.averaged.n_averaged.copy_(state["n_averaged"])
        self.rng.bit_generator.state = state["rng"]["numpy"]
        torch.set_rng_state(state["rng"]["torch"])
        if state["rng_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])


def train(
    settings: Settings, run: Path, device: torch.device, resume: bool, group: Group = ALONE
) -> Trainer:
    """Train until the last update; rank 0 keeps the checkpoints that validate best in `run`."""
    with group.together(), group.told_once():
        trainer = Trainer(settings, device, group)
    state, why = None, "files, but no run"
    if resume and group.is_main:
        state, why = _taken_up(trainer, run)
    if (state := group.broadcast(state)) is not None:
        trainer.load_state_dict(state)
    elif resume:  # what was taken up half is built anew
        trainer = Trainer(settings, device, group)
    if group.is_main and state is None:
        _begin(trainer, run, why)
    if group.is_main and not (run / checkpoints.HISTORIES_NAME).exists():
        goals, seed = trainer.goals["test"], settings.train.seed + 1
        test = learning_histories(goals, settings.env, settings.source, seed, N_TEST_STREAMS)
        test.save(run / checkpoints.HISTORIES_NAME)
    n_updates, eval_every = settings.train.n_updates, settings.train.eval_every
    style = {"desc": "training", "unit": "update", "disable": not group.is_main}
    try:
        with tqdm(total=n_updates, initial=trainer.step, **style) as bar:
            while trainer.step < n_updates or trainer.losses:
                is_due = trainer.step % eval_every == 0 or trainer.step == n_updates
                if trainer.losses and is_due:
                    _keep_if_best(trainer, run)
                    continue
                with undivided():
                    trainer.update()
                bar.update()
                bar.set_postfix_str(f"loss {np.mean(trainer.losses[-100:]):.3f}", refresh=False)
    except KeyboardInterrupt:
        if group.is_main:
            checkpoints.save_checkpoint(run / RESUME_NAME, trainer.state_dict())
            print(f"Stopped at update {trainer.step}. Go on with the same command and --resume.")
        raise
    return trainer


def _taken_up(trainer: Trainer, run: Path) -> tuple[dict[str, Any] | None, str]:
    """What an interrupted run goes on from, or None and why not."""
    try:
        state = checkpoints.read_file(run / RESUME_NAME)
        trainer.load_state_dict(state)
        expect(trainer.step in range(trainer.settings.train.n_updates + 1), f"{trainer.step=}")
        kept = [f"ckpt-{entry['step']}.pt" for entry in trainer.log if entry["best"]]
        expect(all((run / name).exists() for name in kept[-1:]), f"no {kept[-1:]}")
        return state, ""
    except Exception as error:  # whatever was done to it
        return None, f"a damaged {RESUME_NAME} ({told(error)})"


def _begin(trainer: Trainer, run: Path, why: str) -> None:
    """Set aside what lies in the folder of a new run, and write what a resume needs."""
    names = [path.name for path in checkpoints.checkpoints_in(run)]
    if aside := set_aside(run, [*names, checkpoints.HISTORIES_NAME, LOG_NAME, RESUME_NAME]):
        note(f"{run} held {why}: moved to {aside}, and the run begins anew")
    checkpoints.save_checkpoint(run / RESUME_NAME, trainer.state_dict())


def _keep_if_best(trainer: Trainer, run: Path) -> None:
    """Evaluate; rank 0 writes what a resume needs, and a checkpoint as good as the best."""
    group = trainer.group
    entry = group.broadcast(trainer.validate())
    with undivided():
        trainer.log.append(entry)
        trainer.losses = []
        if group.is_main:
            state = trainer.state_dict()
            if entry["best"]:
                kept = {key: state[key] for key in ("step", "config", "model", "goals")}
                kept |= {"optimizer": None, "lr_sched": None}
                checkpoints.save_checkpoint(run / f"ckpt-{trainer.step}.pt", kept)
            checkpoints.save_checkpoint(run / RESUME_NAME, state)
    if group.is_main:
        tqdm.write(progress_line(entry, trainer.settings.train.eval_episodes))


def finish(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Evaluate the chosen checkpoint on the test goals; rank 0 writes `training.json`."""
    seconds, group, chosen = round(time.perf_counter() - trainer.started, 1), trainer.group, None
    with group.together():
        if group.is_main:
            chosen = checkpoints.load_checkpoint(checkpoints.checkpoints_in(run)[-1])
            chosen = chosen.step, chosen.model.state_dict()
    chosen_step, weights = group.broadcast(chosen)
    trainer.averaged.module.load_state_dict(weights)
    goals, n_rollouts = trainer.goals["test"], trainer.settings.train.final_rollouts
    test = {
        sliding: trainer.evaluate(goals, n_rollouts, sliding, f"acting on test goals, {sliding}")
        for sliding in trainer.slidings
    }
    result = {
        "config": to_dict(*trainer.settings),
        "chosen_step": chosen_step,
        "seconds": seconds,
        "source_relative_return": trainer.source_return,
        "test": test["step"],
        "test_by_sliding": {sliding: numbers["return"] for sliding, numbers in test.items()},
        "log": trainer.log,
    }
    # Not write_json: a training that diverged has losses that are no numbers.
    if group.is_main:
        write_atomically(run / LOG_NAME, json.dumps(result, indent=1) + "\n")
    return result
