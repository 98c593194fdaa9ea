"""`clusterns train`: sentences in, a sentence encoder out.

The loop: two views of each sentence, an embedding of each through a head, `ClusterNSLoss`, AdamW with linear
decay, a dev score every few hundred steps, the best model kept. The same code runs in one process and in
those that torchrun starts. In shapes B is the rows of a batch (this process's share of them) and V their
views: 2, or 3 with hard negatives.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from .cached import CachedClusterNSLoss
from .data import Batches, batches
from .encoder import SentenceEncoder
from .files import check_room, replacing
from .training.checkpoint import Checkpoint, Checkpoints
from .training.config import FREE_ON_RESUME, TEMPERATURES, TrainConfig, to_dict
from .training.devices import Precision, adamw, checkpoint_layers, explained_errors
from .training.figure import draw_run
from .training.hub import check_hub, upload, write_card
from .training.journal import Journal, import_tracker
from .training.mlm import MaskedLanguageHead, TokenMasker, TrainingModel
from .training.processes import Processes, freeze_unused, joined
from .training.resume import (
    changes,
    find_checkpoint,
    fingerprint,
    fingerprints,
    load_checkpoint,
    save_checkpoint,
)
from .training.run_folder import (
    CARD,
    LOG,
    PICTURE,
    STATE,
    Claim,
    begin_anew,
    claimed,
    is_of_user,
    read_summary,
    report,
    write_summary,
)
from .training.task import Task, prepare_encoder, prepare_task
from .training.watch import Watch, measure

Scores = dict[str, float]
Inputs = dict[str, Tensor]


def train(config: TrainConfig) -> dict[str, Scores]:
    """Run a whole training; returns the dev scores "before" and "after" (of the best model).

    `training/run_folder.py` lists what it writes into `output_dir`. With `config.resume` it goes on from the
    newest checkpoint there and ends as without the interruption: to the bit, but for the times in the log, on
    a device that computes the same bits twice, as the CPU does.

    Raises `ValueError` or `OSError` with one line for bad settings, data, models, folders and checkpoints, a
    loss that is no number, and a full device or disk.
    """
    config.check()
    config.build_prompt()  # says what is wrong with a template before the data is read
    output = Path(config.output_dir)
    with joined(config.device) as processes, contextlib.ExitStack() as stack:
        claim: Claim | None = None
        if processes.is_first:
            if config.push_to_hub is not None:
                check_hub()
            if config.report_to != "none":
                import_tracker(config.report_to)  # before the data is read, or anything removed
            overwrite, resume = config.overwrite_output_dir, config.resume
            claim = stack.enter_context(claimed(output, overwrite=overwrite, resume=resume))
        summary = processes.of_first(read_summary(output) if config.resume else {})
        if summary.get("finished") and not any(changes(config, summary["settings"], FREE_ON_RESUME)):
            processes.say(f"{output}: this training has ended already")
            if config.push_to_hub is not None and processes.is_first:
                upload(output, config.push_to_hub)
            return summary["scores"]
        checkpoint = find_checkpoint(config, output, processes, summary)
        set_seed(config.seed)
        task = prepare_task(config, processes.say)
        encoder = prepare_encoder(config, task).to(processes.device)
        run = Run(config, output, task, encoder, processes, claim)
        run.begin(checkpoint)
        stack.callback(run.journal.close)
        try:
            with explained_errors(config, lambda: f"step {run.step}"):
                run.loop()
        except KeyboardInterrupt:
            if claim is None or not claim.has_begun:
                raise
            more = "" if run.checkpoints.last() else "--checkpoint-steps with "
            how = f"{more}--resume {'keeps more' if more else 'goes on from it'}"
            raise KeyboardInterrupt(f"step {run.step}: {run.left()}; {how}") from None
        scores = run.finish()
        if config.push_to_hub is not None and processes.is_first:
            upload(output, config.push_to_hub)
        return scores


class Run:
    """State of the loop: model, optimiser, place in the data, log and the best score so far."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        task: Task,
        encoder: SentenceEncoder,
        processes: Processes,
        claim: Claim | None,
    ):
        self.config, self.output, self.task, self.claim = config, output, task, claim
        self.origin = fingerprint(encoder)
        self.encoder, self.processes, self.device = encoder, processes, processes.device
        self.precision = Precision.choose(config.precision, self.device)
        self.loss_fn = config.build_loss(encoder.embedding_dim, processes.group).to(self.device)
        # What a checkpoint holds, by the name it has there.
        self.modules: dict[str, nn.Module] = {"encoder": encoder, "loss": self.loss_fn}
        self.masker: TokenMasker | None = None
        if config.mlm_weight:
            self.masker = TokenMasker(encoder.tokenizer, config.mlm_probability, config.seed)
            self.modules["mlm"] = MaskedLanguageHead(encoder.transformer, config.model).to(self.device)
            processes.say(f"head of masked language modelling: {self.modules['mlm'].origin}")
        if processes.size > 1:
            views = encoder.view_tokenizer(max_length=config.max_length)
            freeze_unused(encoder, self.to_device(views([task.rows[0]])))
        if config.gradient_checkpointing:
            checkpoint_layers(encoder.transformer)
        if config.compile:
            encoder.transformer.compile()
            encoder.by_length = False
        # Compiled code is made for each T: few of them.
        multiple = 8 if config.compile and config.max_length + 8 <= encoder.longest_input else None
        self.tokenize = encoder.view_tokenizer(max_length=config.max_length, pad_to_multiple_of=multiple)
        self.model = processes.wrap(TrainingModel(encoder, self.modules.get("mlm")))
        # On several ranks the backward pass averages the gradients, but within this.
        self.no_sync: Callable[[], Any] = getattr(self.model, "no_sync", contextlib.nullcontext)
        self.views = max(2, len(task.rows[0]))
        self.total_steps = self.plan()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(
            {"params": self.parameters, "weight_decay": config.weight_decay},
            {"params": list(self.loss_fn.parameters()), "weight_decay": 0.0},  # a learned temperature
            learning_rate=config.learning_rate,
        )
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, config.warmup_steps, self.total_steps)
        self.scaler = self.precision.scaler()
        self.checkpoints = Checkpoints(output, config.keep_checkpoints)
        self.watch = Watch(self.loss_fn, config.batch_size)

        self.step = 0  # optimiser steps so far
        self.epoch, self.batch = 0, 0  # place of the next batch
        self.deferred = 0  # rows of the epoch that had to wait for a later batch
        self.first_scores: Scores = {}
        self.best_scores: Scores = {}
        self.best_step = 0
        self.saved: list[str] = []  # files of the best model
        self.evaluations_without_gain = 0
        self.bad_step = torch.full((), -1, device=self.device)  # the first with a loss that is no number

    def plan(self) -> int:
        """Optimiser steps in all; says how they come about, and what of the settings has no effect."""
        config, say, size = self.config, self.processes.say, self.processes.size
        if len(self.task.rows) < config.batch_size:
            raise ValueError(
                f"--batch-size: expected at most the {len(self.task.rows):,} rows of "
                f"{config.train_file or 'the documentation'}, got {config.batch_size}"
            )
        batches = len(self.batches(0, 0))
        total = config.total_steps(batches)
        share = f" ({config.batch_size // size} on each of {size} processes)" if size > 1 else ""
        rest = len(self.task.rows) - batches * config.batch_size
        parts = [f"{batches:,} batches of {config.batch_size}{share} an epoch"]
        parts += [f"without {rest:,} rows that fill none"] if rest else []
        parts += [f"{config.accumulation_steps} of them a step"] if config.accumulation_steps > 1 else []
        parts.append(
            f"{total:,} steps by " + ("--max-steps" if config.max_steps else f"{config.epochs} epochs")
        )
        parts += [f"warm-up of {config.warmup_steps}"] if config.warmup_steps else []
        if self.task.dev is not None:
            within = config.eval_steps < total
            parts.append(
                f"dev every {config.eval_steps} steps"
                if within
                else "dev before the first and after the last"
            )
        if config.checkpoint_steps:
            parts.append(f"checkpoints every {config.checkpoint_steps} steps")
        parts.append(f"{config.num_clusters} clusters" if config.num_clusters else "no clusters")
        say(f"plan: {', '.join(parts)}")
        for text in config.without_effect():
            warnings.warn(text, stacklevel=2)
        if config.warmup_steps >= total:
            text = (
                f"--warmup-steps {config.warmup_steps}: the learning rate rises to the last of {total} steps"
            )
            warnings.warn(text, stacklevel=2)
        if config.checkpoint_steps and config.checkpoint_steps > total:
            text = f"--checkpoint-steps {config.checkpoint_steps}: none of the {total} steps is saved"
            warnings.warn(text, stacklevel=2)
        return total

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Start a log, or go on from a checkpoint."""
        config, is_first = self.config, self.processes.is_first
        if is_first:
            weights = sum(value.nbytes for value in self.encoder.state_dict().values())
            # A checkpoint holds them with two moments each.
            check_room("--output-dir", self.output, weights * (4 if config.checkpoint_steps else 1))
        if checkpoint is not None:
            load_checkpoint(self, checkpoint)
        else:
            self.processes.part_random_states(config.seed)
        if is_first:
            if checkpoint is not None:
                write_summary(self.output, config, finished=False)
            elif removed := begin_anew(self.output, config):
                self.processes.say(f"{self.output}: removed of an earlier training: {', '.join(removed)}")
            if is_of_user(self.output / CARD):
                self.processes.say(
                    f"{self.output / CARD}: not of a training, it stays; no model card is written"
                )
        self.journal = Journal(
            self.output / LOG,
            seconds=checkpoint.progress["seconds"] if checkpoint else None,
            step=self.step,
            report_to=config.report_to,
            settings=to_dict(config),
            silent=not is_first,
        )
        self.data = self.stream()

    def loop(self) -> None:
        """Train to the last step or to the early stop."""
        if self.step == 0:
            self.judge()
        self.encoder.train()
        total, silent = self.total_steps, not self.processes.is_first
        with tqdm(total=total, initial=self.step, desc="train", unit="step", disable=silent) as bar:
            while self.step < self.total_steps and not self.is_to_stop:
                self.step += 1
                last = self.step == self.total_steps
                logged = last or self.step % self.config.log_steps == 0
                terms = self.train_step(watched=logged)
                if self.claim is not None:
                    self.claim.has_begun = True
                bar.update()
                if logged:
                    self.log_terms(terms, bar)
                if last or self.step % self.config.eval_steps == 0:
                    self.judge()
                if self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
                    self.check_finite()
                    save_checkpoint(self)
        if self.is_to_stop:
            self.journal.say(self.step, f"{self.config.patience} evaluations without a gain, stopped")

    def stream(self) -> Generator[tuple[Inputs, Inputs | None]]:
        """Token ids (V·B, T) of batch after batch, on the device, without end; and a masked copy for MLM."""
        while True:
            loader = self.batches(self.epoch, self.batch)
            for inputs in loader:
                self.batch, self.deferred = self.batch + 1, loader.deferred
                masked = None
                if self.masker is not None:
                    masked = self.masker(inputs, self.processes.rank, self.epoch, self.batch)
                yield self.to_device(inputs), masked and self.to_device(masked)
            self.tell_repeats()
            self.epoch, self.batch, self.deferred = self.epoch + 1, 0, 0

    def tell_repeats(self) -> None:
        """Whether rows of this epoch had to wait for a batch without an equal text."""
        if self.deferred:
            text = f"{self.deferred:,} rows waited for a batch without an equal text"
            self.journal.event(self.step, "equal texts", text, rows=self.deferred)

    def batches(self, epoch: int, start: int) -> Batches:
        """This process's share of an epoch's batches from number `start` on, tokenised."""
        return batches(
            self.task.rows,
            batch_size=self.config.batch_size,
            tokenize=self.tokenize,
            seed=self.config.seed,
            epoch=epoch,
            start=start,
            num_workers=self.config.workers(self.device),
            pin_memory=self.device.type == "cuda",
            unique=self.config.unique,
            rank=self.processes.rank,
            world_size=self.processes.size,
        )

    def to_device(self, inputs: Inputs) -> Inputs:
        """Copies that the host does not wait for, since their memory is pinned."""
        if self.device.type == "cuda":
            inputs = {name: value.pin_memory() for name, value in inputs.items()}
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}

    def train_step(self, *, watched: bool) -> dict[str, Tensor]:
        """One optimiser step; where it is watched, returns its figures, 0-d on the device."""
        count = self.config.accumulation_steps
        every: list[dict[str, Tensor]] = []
        for number in range(count):
            inputs, masked = next(self.data)
            with self.no_sync() if number + 1 < count else contextlib.nullcontext():
                loss, terms = self.loss(inputs, masked, watched=watched)
                self.scaler.scale(loss / count).backward()
            every.append(terms)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        total = torch.stack([terms["loss"] for terms in every]).sum()
        if not self.scaler.is_enabled():  # which leaves out steps of an infinite gradient
            total = total + norm
        self.bad_step = torch.where((self.bad_step < 0) & ~total.isfinite(), self.step, self.bad_step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.loss_fn.temperature, nn.Parameter):
            self.loss_fn.temperature.data.clamp_(*TEMPERATURES)
        if not watched:
            return {}
        names = [name for name in every[-1] if all(name in terms for terms in every)]
        mean = {name: torch.stack([terms[name] for terms in every]).mean() for name in names}
        return {**mean, "gradient_norm": norm}

    def loss(
        self, inputs: Inputs, masked: Inputs | None, *, watched: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, 0-d, of the V views of B rows (V·B, T), and its terms."""
        was_active = self.loss_fn.clustering_active
        mlm = None
        if isinstance(self.loss_fn, CachedClusterNSLoss):
            seen: list[Tensor] = []  # (rows, D) of each mini-batch, in order
            parts = zip(*(value.chunk(self.views) for value in inputs.values()), strict=True)
            views = [dict(zip(inputs, part, strict=True)) for part in parts]  # V of tensors (B, T)
            loss = self.loss_fn(self.encoding(seen), *views, no_sync=self.no_sync)
            embeddings = torch.cat(seen).chunk(self.views)  # V of (B, D)
        else:
            with self.precision.autocast():
                together, mlm = self.model(inputs, masked)  # (V·B, D), 0-d
            embeddings = together.chunk(self.views)  # V of (B, D)
            loss = self.loss_fn(*embeddings)
        terms = dict(self.loss_fn.last)
        if mlm is not None and masked is not None:
            # The mean over the masked tokens of all ranks, whose gradients are averaged.
            count = mlm.new_full((), len(masked["labels"]))
            total, tokens = self.processes.sum(torch.stack([mlm.detach(), count]))
            tokens = tokens.clamp_min(1)
            loss = loss + self.config.mlm_weight * self.processes.size * mlm / tokens
            terms["mlm"] = total / tokens
            terms["loss"] = terms["loss"] + self.config.mlm_weight * terms["mlm"]
        if self.loss_fn.clustering_active and not was_active:
            cosine = float(terms["mean_cosine"])
            self.journal.event(self.step, *self.watch.start(cosine), mean_cosine=cosine)
        if watched:
            whole = [self.processes.rows_of_all(view.detach()) for view in embeddings]
            terms |= measure(*whole, loss_fn=self.loss_fn, clustered="nearest_cosine" in terms)
        return loss, terms

    def encoding(self, seen: list[Tensor]) -> Callable[[Inputs], Tensor]:
        """What gives the embeddings (rows, D) of token ids (rows, T), and notes those of the first pass."""

        def encode(inputs: Inputs) -> Tensor:
            with self.precision.autocast():
                embeddings = self.model(inputs)[0]
            if not torch.is_grad_enabled():
                seen.append(embeddings)
            return embeddings

        return encode

    def log_terms(self, terms: dict[str, Tensor], bar: tqdm) -> None:
        """Read the figures of this step from the device, and log them."""
        if not self.processes.is_first:
            return
        self.check_finite()
        values = dict(zip(terms, torch.stack([*terms.values()]).tolist(), strict=True))
        values["learning_rate"] = self.schedule.get_last_lr()[0]
        if isinstance(self.loss_fn.temperature, nn.Parameter):
            values["temperature"] = float(self.loss_fn.temperature.detach())
        bar.set_postfix(loss=f"{values['loss']:.4f}", cosine=f"{values['mean_cosine']:.3f}")
        self.journal.figures(self.step, values)
        for event, text in self.watch.look(self.step, values):
            self.journal.event(self.step, event, text)

    def check_finite(self) -> None:
        """Stop where a loss or gradient was no number; torchrun then stops the other ranks."""
        step = int(self.bad_step) if self.processes.is_first else -1
        if step < 0:
            return
        raise ValueError(
            f"step {step}: expected a finite loss and gradient, got NaN or infinity; {self.left()}; lower "
            "--learning-rate"
        )

    def left(self) -> str:
        """What of this run is on the disk."""
        kept = f"the best model so far, of step {self.best_step}, is in {self.output}"
        last = self.checkpoints.last()
        good = f"; the last good checkpoint is {last}" if last else ""
        return f"{kept if self.best_scores else 'no model was saved'}{good}"

    @property
    def is_to_stop(self) -> bool:
        """Whether the dev score has not risen for too long."""
        return 0 < self.config.patience <= self.evaluations_without_gain

    def judge(self) -> None:
        """Score the encoder on dev, on one rank, and keep it if it is the best so far."""
        if self.task.dev is None:
            return
        self.check_finite()
        try:
            scores = self.processes.of_first(self.task.dev(self.encoder) if self.processes.is_first else {})
        except ValueError as error:
            if self.step and "finite" in str(error):  # the step before was, and made the weights too large
                raise ValueError(f"step {self.step}: {error}; lower --learning-rate") from error
            raise
        name, score = next(iter(scores.items()))
        self.journal.scores(self.step, scores)
        if not self.best_scores or score > self.best_scores[name]:
            self.first_scores = self.first_scores or scores
            self.best_scores, self.best_step, self.evaluations_without_gain = scores, self.step, 0
            self.save()
            return
        self.evaluations_without_gain += 1

    def save(self) -> None:
        """Keep the encoder and the clustering state that belongs to it."""
        if self.processes.is_first:
            state = {**self.loss_fn.state_dict(), "step": torch.tensor(self.step)}
            self.saved = self.encoder.save(self.output, beside={STATE: state})
            write_card(self)

    def finish(self) -> dict[str, Scores]:
        """The last model where there is no best one; summary, picture and what to do next."""
        scores = {"before": self.first_scores, "after": self.best_scores}
        if not self.processes.is_first:
            return scores
        if self.task.dev is None:
            self.save()
        self.data.close()  # ends the processes that tokenise
        self.tell_repeats()
        last = next((record for record in reversed(self.journal.records) if "loss" in record), None)
        for event, text in self.watch.end(self.step, last) if last else ():
            self.journal.event(self.step, event, text)
        with replacing(self.output / PICTURE) as path:
            draw_run(self.journal.records, path, self.output.resolve().name, self.config.bml_weight)
        write_summary(
            self.output,
            self.config,
            scores=scores,
            best_step=self.best_step,
            data=fingerprints(self),
            files=self.saved,
            clustered=self.loss_fn.clustering_active,
            finished=True,
        )
        report(self.config, self.output, scores, self.best_step, self.total_steps)
        return scores
