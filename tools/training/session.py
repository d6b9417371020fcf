"""A training run in memory: the model, the parameter server that trains it, and its way into checkpoints and back.

Everything that a step depends on is a pure function of the settings, the corpus and the step's number: the data
(loader.py), dropout (a generator placed at (step, microbatch)), the learning rate (schedule). So a run that goes on
from a checkpoint computes the same bits as one that was never interrupted, with any number of workers and shards.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import engine as eg
from engine.sharder.consistency import inverse_staleness
from tools.training import checkpoint
from tools.training.cache import TokenCache
from tools.training.checkpoint import Checkpoint
from tools.training.errors import ProgramError
from tools.training.evaluation import Score, sampled_score
from tools.training.loader import Loader
from tools.training.settings import Settings


def configuration(settings: Settings, vocab_size: int) -> eg.models.TransformerConfig:
    """A Llama-style decoder (Touvron et al. 2023, arXiv:2302.13971), with the embedding tied to the output."""
    return eg.models.TransformerConfig(
        kind="decoder", vocab_size=vocab_size, context_length=settings.context, layers=settings.layers,
        heads=settings.heads, kv_heads=settings.kv_heads or 0, width=settings.width, hidden=settings.hidden or 0,
        dropout=settings.dropout, positions="rotary", norm="rms_norm", activation="swiglu", bias=False,
        tie_weights=True)


def schedule(settings: Settings) -> Callable[[int, str], Mapping[str, float]]:
    """hyper(step, parameter name) for the shards: warm-up and cosine; matrices decay, gains do not."""
    consistency = eg.sharder.Consistency.parse(settings.consistency)
    warmup, steps = (consistency.updates(n, settings.microbatches) for n in (settings.warmup, settings.steps))
    rate = eg.optim.warmup_cosine(settings.lr, warmup, steps)

    def hyper(step: int, name: str) -> dict[str, float]:
        return {"lr": rate(step), "weight_decay": 0.0 if "norm" in name else settings.weight_decay}

    return hyper


@dataclass(frozen=True)
class Work:
    """A worker's program: pull the parameters, compute the gradients of its microbatches and push them.

    early: push each gradient as soon as it is there, while others are computed; else all at once, which eg.capture
           computes without Python (to the same bits)
    """

    config: eg.models.TransformerConfig
    loader: Loader
    seed: int
    precision: str = "float32"
    early: bool = False

    def __call__(self, client: eg.sharder.Client) -> None:
        replica = eg.models.Transformer(self.config)
        generator = eg.Generator(self.seed)

        def loss_sum(tokens: eg.Tensor, targets: eg.Tensor) -> eg.Tensor:
            return replica.loss(tokens, targets, reduction="sum")

        def with_gradients(tokens: eg.Tensor, targets: eg.Tensor) -> eg.Tensor:
            loss = loss_sum(tokens, targets)
            loss.backward()
            return loss

        compute = loss_sum if self.early else eg.capture(with_gradients, replica)
        while client.clock():
            client.pull(replica)
            for index in client.microbatches:
                client.localize(index, replica)
                tokens, targets = self.loader.microbatch(client.step, index)
                # step 0 drew the initial weights
                with eg.seed(generator.at(client.step + 1, index)), eg.autocast(self.precision):
                    loss = compute(eg.tensor(tokens), eg.tensor(targets))
                if self.early:
                    client.backward(index, replica, loss, targets.size)
                else:
                    client.push(index, replica, loss.item(), targets.size)


class Session:
    """The state of a run and the operations on it. `step` counts the finished steps; the Ray driver keeps its logs in
    `folder`."""

    def __init__(self, settings: Settings, cache: TokenCache, corpus_facts: dict[str, Any], folder: Path | None = None):
        self.settings, self.cache, self.corpus_facts = settings, cache, corpus_facts
        self.loader = Loader(cache.training, settings.context, settings.batch, settings.microbatches, settings.seed)
        self.byte_lengths = cache.tokenizer.byte_lengths()
        self.config = configuration(settings, cache.tokenizer.vocab_size)
        with eg.seed(settings.seed):
            self.model = eg.models.Transformer(self.config)
        self.hyper = schedule(settings)
        adam = eg.optim.AdamWRule(beta1=settings.beta1, beta2=settings.beta2)
        rule, local = (adam, None) if settings.outer_lr is None else (eg.optim.SGDRule(lr=settings.outer_lr), adam)
        kept: dict[str, Any] = {"durability": settings.durability}
        if settings.save_every is not None:
            kept["save_every"] = settings.save_every
        kind: Any
        own: dict[str, Any]
        kind, own = {"threads": (eg.sharder.ParameterServer, {}), "processes": (eg.sharder.ProcessServer, kept),
                     "ray": (eg.sharder.RayServer, {"folder": folder, **kept})}[settings.driver]
        self.server: Any = kind(
            self.model, rule, workers=settings.workers, shards=settings.shards,
            compress=None if settings.compress == "none" else settings.compress, local=local,
            microbatches=settings.microbatches, clip_norm=settings.clip, hyper=self.hyper,
            consistency=eg.sharder.Consistency.parse(settings.consistency, settings.backups),
            damping=inverse_staleness if settings.damping == "inverse" else None, placement=settings.placement,
            zero=settings.zero, **own)
        self.seconds = 0.0  # of training in earlier sessions of this run

    @property
    def step(self) -> int:
        return self.server.clock

    # ── training ────────────────────────────────────────────────────────────────────────────────────

    def steps(self, trace: Path | None = None) -> Iterator[eg.sharder.Committed]:
        """Train to the end of the run, one item a finished step; trace: a file for the timeline."""
        work = Work(self.config, self.loader, self.settings.seed, self.settings.precision,
                    early=self.settings.zero > 1)
        left = self.settings.steps - self.step
        done: Iterator[eg.sharder.Committed] = self.server.run(work, clocks=left, trace=trace)
        return done

    # ── looking at the model ────────────────────────────────────────────────────────────────────────

    def current_model(self) -> eg.models.Transformer:
        """The model with the server's parameters, ready to predict."""
        eg.sharder.bind(self.model, self.server.parameters())
        return self.model.eval()

    def not_finite(self) -> str | None:
        """The name of a parameter that holds NaN or an infinity, if one does."""
        return next((name for name, x in self.server.parameters().items() if not np.isfinite(x).all()), None)

    def validate(self) -> Score:
        """A quick estimate on the validation text."""
        return sampled_score(self.current_model(), self.cache.validation, self.byte_lengths, self.settings.context,
                             self.settings.validate_windows)

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────

    def checkpoint(self, seconds: float) -> Checkpoint:
        """Everything that a resumed run needs. `seconds`: training time so far."""
        state = self.server.state()
        kinds: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}}
        for key, array in state.items():
            if key.startswith("parameters/"):
                kinds["model"][key.removeprefix("parameters/")] = array
            elif key != "clock":
                kinds["optimizer"][key] = array
        facts = {"step": self.step, "seconds": round(seconds, 1), "settings": asdict(self.settings),
                 "corpus": self.corpus_facts, "tokenizer": self.cache.tokenizer.name,
                 "data_position": self.step * self.settings.microbatches * self.settings.batch,
                 "generator": eg.Generator(self.settings.seed).at(self.step + 1).state_dict(),
                 "kernels": kernels(self.settings.precision), "versions": versions()}
        return Checkpoint(kinds["model"], kinds["optimizer"], self.config.asdict(), facts)

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint, saved with any number of shards."""
        state: dict[str, Any] = {f"parameters/{name}": array for name, array in saved.model.items()}
        try:
            self.server.load({**state, **saved.optimizer, "clock": saved.step})
        except ValueError as error:
            raise ProgramError(f"the checkpoint of step {saved.step} does not fit this model: {error}") from error
        self.seconds = float(saved.facts["seconds"])

    def digest(self) -> str:
        """SHA-256 of every bit of the parameters and the optimizer's state."""
        return checkpoint.arrays_digest({name: np.asarray(value) for name, value in self.server.state().items()})


def kernels(precision: str) -> str:
    """The kernels that compute here: results in a precision have the same bits on machines where this is the same."""
    from engine.backend import get_backend

    return str(getattr(get_backend("cpu"), "level" if precision == "float32" else "instructions", "numpy"))


def versions() -> dict[str, str]:
    return {"shardgrad": eg.__version__, "python": platform.python_version(), "numpy": np.__version__}
