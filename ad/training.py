"""Train an AD model on learning histories, choose a checkpoint by validation goals, evaluate it."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ad import checkpoints
from ad.checkpoints import HISTORIES_NAME, LOG_NAME, RESUME_NAME, save_checkpoint
from ad.darkroom import split_goals
from ad.evaluation import Reads, possible, progress_line, rollout_goals, score
from ad.source import learning_histories, relative_return
from ad.thinning import draw_batch
from config import EnvConfig, ModelConfig, SourceConfig, TrainConfig
from dataset import CONTEXT, ADDataset
from historylens.common.errors import expect, note, told, undivided
from historylens.common.files import set_aside, write_atomically
from historylens.common.processes import ALONE, Group
from historylens.common.settings import to_dict
from model import ADTransformer

N_TEST_STREAMS = 8  # learning histories a test goal that are kept beside the checkpoint
N_TRAIN_GOALS_EVALUATED = 6


class Settings(NamedTuple):
    """Everything that a run depends on."""

    env: EnvConfig = EnvConfig()
    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


def goals_of(env: EnvConfig) -> dict[str, np.ndarray]:
    """The goals to train on, to validate on and to test on, as `split_goals` gives them."""
    sizes = env.grid_size, env.n_test_goals, env.n_validation_goals
    return split_goals(env.goal_seed, *sizes, env.env, env.n_train_goals)


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
    """Cross-entropy in nats of the source's actions; a module, to be averaged over processes."""

    def __init__(self, model: ADTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean over all prefixes of all windows of a batch, as `ADDataset` describes it."""
        logits = self.model.forward_packed(*map(batch.get, (*CONTEXT, "query_states")))  # (B, q, A)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["target_actions"].flatten())


class Trainer:
    """A model in training, and everything needed to go on with it exactly."""

    def __init__(self, settings: Settings, device: torch.device, group: Group = ALONE) -> None:
        env, source, model, train = settings
        self.settings, self.device, self.group, self.goals = settings, device, group, goals_of(env)
        histories = learning_histories(self.goals["train"], env, source, train.seed)
        windows = model.n_transit - 1, train.max_stride, train.random_episodes
        self.dataset = ADDataset(histories, *windows)
        self.source_return = relative_return(histories, slice(-20, None), env)
        self.rng = np.random.default_rng(train.seed)
        torch.manual_seed(train.seed)
        self.model = ADTransformer(model).to(device)
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay)
        )
        self.objective = group.averaging(PackedLoss(self.model), device)
        self.optimizer = make_optimizer(self.model, train)
        self.lr_sched = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, train.n_warmup, train.n_updates)
        )
        models = {"model": self.averaged.module, "training_model": self.model}
        self.modules = models | {"optimizer": self.optimizer, "lr_sched": self.lr_sched}
        holds_two_episodes = self.model.n_context_max >= 2 * env.horizon
        self.slidings: list[Reads] = ["step", "episode"] if holds_two_episodes else ["step"]
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
        env, train_goals, tried = self.settings.env, self.goals["train"], self.goals["validation"]
        near = train_goals[possible(env, train_goals) > 0]
        spread = near[np.unique(np.linspace(0, len(near) - 1, N_TRAIN_GOALS_EVALUATED).astype(int))]
        n, full = self.settings.train.eval_rollouts, self.slidings[-1]
        cases = {"train": (spread, max(1, n // 4), full), "validation": (tried, n, full)}
        if self.settings.train.history_dropout:  # it is to bear compressed history as well
            cases["compressed"] = (tried, n, "compressed")
        entry: dict[str, Any] = {"step": self.step, "loss": float(np.mean(self.losses))}
        for name, case in cases.items():
            numbers = self.evaluate(*case, f"acting on {name} goals")
            entry |= {f"{name}_{key}": value for key, value in numbers.items()}
        _, *chosen_by = cases  # nothing is chosen by the return on training goals
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
        files = [*checkpoints.checkpoints_in(run), HISTORIES_NAME, LOG_NAME, RESUME_NAME]
        if aside := set_aside(run, [Path(file).name for file in files]):
            note(f"{run} held {why}: moved to {aside}, and the run begins anew")
        save_checkpoint(run / RESUME_NAME, trainer.state_dict())
    if group.is_main and not (run / HISTORIES_NAME).exists():
        goals, seed = trainer.goals["test"], settings.train.seed + 1
        test = learning_histories(goals, settings.env, settings.source, seed, N_TEST_STREAMS)
        test.save(run / HISTORIES_NAME)
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
            save_checkpoint(run / RESUME_NAME, trainer.state_dict())
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
                save_checkpoint(run / f"ckpt-{trainer.step}.pt", kept)
            save_checkpoint(run / RESUME_NAME, state)
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
    test, n_rollouts = {}, trainer.settings.train.final_rollouts
    for sliding in trainer.slidings:
        case = trainer.goals["test"], n_rollouts, sliding
        test[sliding] = trainer.evaluate(*case, f"acting on test goals, {sliding}")
    result = {
        "config": to_dict(*trainer.settings),
        "chosen_step": chosen_step,
        "seconds": seconds,
        "source_relative_return": trainer.source_return,
        "test": test["step"],
        "test_by_sliding": {sliding: numbers["return"] for sliding, numbers in test.items()},
        "log": trainer.log,
    }
    if group.is_main:  # as JSON that allows NaN: a loss of a training that diverged is none
        write_atomically(run / LOG_NAME, json.dumps(result, indent=1) + "\n")
    return result
