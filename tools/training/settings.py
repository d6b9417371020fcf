"""The flags of a training run: what each means, which values are possible, and which a resumed run may change.

Some settings decide every bit of the result (the model, the data, the schedule); a resumed run must have them as
they were. The others (how many workers and shards, how often to save) change nothing but time, and may differ.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from engine.optim import AdamWRule, SGDRule
from engine.sharder import Consistency
from engine.sharder.compression import codec_for
from tools.training.errors import ProgramError


def flag(default: Any, text: str, free: bool = False) -> Any:
    """A setting with its help text; free: a resumed run may change it."""
    return field(default=default, metadata={"text": text, "free": free})


@dataclass(frozen=True)
class Settings:
    """Every setting with its default. The defaults train a model of 1.8 million parameters in minutes on two cores."""

    # the model: a Llama-style decoder (rotary positions, RMSNorm, SwiGLU)
    layers: int = flag(4, "Transformer blocks")
    heads: int = flag(6, "attention heads")
    kv_heads: int | None = flag(None, "key and value heads, fewer for grouped-query attention (default: as --heads)")
    width: int = flag(192, "features of a token")
    hidden: int | None = flag(None, "features inside the feed-forward (default: 8/3 of the width, to a multiple of 64)")
    context: int = flag(256, "tokens the model looks back on")
    dropout: float = flag(0.0, "share of features zeroed in training")
    vocab: int | None = flag(None, "train a byte-pair tokenizer with so many tokens (default: bytes)")

    # the work
    steps: int = flag(1000, "optimizer steps")
    microbatches: int = flag(4, "microbatches in a step, shared out among the workers")
    batch: int = flag(2, "windows of text in a microbatch")
    lr: float = flag(2e-3, "peak learning rate")
    warmup: int = flag(60, "steps until the peak; from there a cosine to zero")
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices")
    beta1: float = flag(0.9, "AdamW's memory of gradients; with --outer-lr less, as 0.4")
    beta2: float = flag(0.95, "AdamW's memory of squared gradients")
    precision: str = flag("float32", "of the factors in matrix products: float32, or bfloat16, which is faster where "
                          "the processor has a unit for it")
    compress: str = flag("none", "how gradients travel: none, fp16, bf16, int8, or topk: and a share, as in topk:0.01")
    outer_lr: float | None = flag(None, "each microbatch takes AdamW's steps by itself, and the server so much of "
                                  "their mean, as 2.0: what topk needs (default: AdamW is the server's)")
    clip: float | None = flag(1.0, "the largest norm of a gradient, or none")
    seed: int = flag(0, "of the initial weights, the order of the data and dropout")

    consistency: str = flag("bsp", "how far workers may run ahead: bsp, ssp: and a staleness bound, as in ssp:3, or "
                            "asp, which needs --clip none")
    damping: str = flag("none", "of the learning rate of late updates: none, or inverse: by 1 / staleness")
    backups: int = flag(0, "microbatches of a step that need not be waited for")

    # how it is run
    driver: str = flag("threads", "what workers and shards are: threads, processes, which may be killed, or ray: "
                       "actors on the nodes of the cluster at RAY_ADDRESS, which see --run's folder", free=True)
    workers: int = flag(2, "threads, processes or actors that compute gradients", free=True)
    shards: int = flag(2, "threads, processes or actors that hold and update parameters", free=True)
    zero: int = flag(1, "stage of ZeRO, what workers do not hold: 1: the optimizer's state (the fastest: steps are "
                     "captured); 2: nor all gradients; 3: nor all parameters", free=True)
    placement: str = flag("ranges", "which shard owns what: ranges, or hashing", free=True)
    durability: str | None = flag(None, "what a lost process or actor comes back with: snapshot (of bsp), or log "
                                  "(default: snapshot for bsp without backups, else log)", free=True)
    save_every: int | None = flag(None, "steps between two snapshots of processes or actors (default: 10)", free=True)
    validate_every: int | None = flag(None, "steps between quick validations (default: a tenth of --steps)", free=True)
    validate_windows: int = flag(64, "windows of a quick validation", free=True)
    checkpoint_every: int | None = flag(None, "steps between checkpoints (default: a tenth of --steps)", free=True)
    keep: int = flag(3, "checkpoints that are kept", free=True)
    samples: int = flag(3, "texts written by the trained model", free=True)
    sample_length: int = flag(400, "tokens in each of them", free=True)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each with one line."""
        at_least = {"vocab": 257, "warmup": 0, "samples": 0, "weight_decay": 0, "backups": 0,
                    "save_every": 0}
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            kind: Any = KINDS[str(setting.type)]
            if value is None and str(setting.type).endswith("None"):
                continue
            if not isinstance(value, (int, kind) if kind is float else kind) or isinstance(value, bool):
                raise ProgramError(f"--{dashed(name)} is {value!r}, expected a value as {setting.default!r} is one")
            if isinstance(value, str):
                continue
            if name in ("lr", "clip", "outer_lr"):
                possible, expected = 0 < value < inf, "a positive number"
            elif name in ("dropout", "beta1", "beta2"):
                possible, expected = 0 <= value < 1, "a number from 0 to below 1"
            elif name == "seed":
                possible, expected = 0 <= value < 2**63, "a whole number in [0, 2**63)"
            else:
                least = at_least.get(name, 1)
                possible, expected = least <= value < inf, f"at least {least}"
            if not possible:
                raise ProgramError(f"--{dashed(name)} is {value}, expected {expected}")
        if self.compress != "none":
            try:
                codec_for(self.compress, AdamWRule() if self.outer_lr is None else SGDRule())
            except ValueError as error:
                raise ProgramError(f"--{error}") from None
        if self.driver not in ("threads", "processes", "ray"):
            raise ProgramError(f"--driver is {self.driver}, expected threads, processes or ray")
        if self.zero not in (1, 2, 3):
            raise ProgramError(f"--zero is {self.zero}, expected 1, 2 or 3")
        if self.width % (2 * self.heads):
            raise ProgramError(f"--width is {self.width}, expected a multiple of twice --heads ({2 * self.heads}): "
                               "each head has an even number of features, which rotary positions turn in pairs")
        if self.heads % (self.kv_heads or self.heads):
            raise ProgramError(f"--kv-heads is {self.kv_heads}, expected a divisor of --heads ({self.heads})")
        if self.workers > self.microbatches:
            raise ProgramError(f"--workers is {self.workers}, expected at most --microbatches ({self.microbatches}): "
                               "a microbatch is computed by one worker")
        if self.backups >= self.microbatches:
            raise ProgramError(f"--backups is {self.backups}, expected fewer than --microbatches ({self.microbatches})")
        for name, words in (("precision", ("float32", "bfloat16")), ("damping", ("none", "inverse")),
                            ("placement", ("ranges", "hashing")),
                            ("durability", ("snapshot", "log"))):
            if getattr(self, name) not in (*words, None):
                raise ProgramError(f"--{name} is {getattr(self, name)}, expected {' or '.join(words)}")
        self._expect_consistent()

    def _expect_consistent(self) -> None:
        """Refuse what does not go with the consistency."""
        try:
            consistency = Consistency.parse(self.consistency, self.backups)
        except ValueError as error:
            raise ProgramError(f"--{error}") from None
        if consistency.asynchronous and self.clip is not None:
            raise ProgramError("--consistency is asp, expected bsp or ssp, or --clip none: the norm that --clip bounds "
                               "is that of the whole step, which asp never sees")
        if consistency.asynchronous and self.zero == 3:
            raise ProgramError("--zero is 3, expected 1 or 2 with --consistency asp: what is pulled again for the "
                               "backward pass would be another version")
        if self.outer_lr is not None and (consistency.asynchronous or self.backups or self.zero == 3):
            which = "--consistency asp" if consistency.asynchronous else f"--backups {self.backups}" if self.backups \
                else "--zero 3"
            raise ProgramError(f"--outer-lr is {self.outer_lr}, expected none with {which}: every step of a microbatch "
                               "counts, and needs all parameters")
        if self.driver != "threads" and self.compress != "none" and (self.backups or consistency.asynchronous):
            which = "--consistency asp" if consistency.asynchronous else f"--backups {self.backups}"
            raise ProgramError(f"--compress is {self.compress}, expected none with {which} and --driver {self.driver}: "
                               "what a microbatch has left to say would depend on who had died when")
        if self.damping != "none" and not (consistency.asynchronous or consistency.staleness):
            raise ProgramError(f"--damping is {self.damping}, expected none with --consistency {self.consistency}: "
                               "nothing is late there")
        if self.durability == "snapshot" and not consistency.replays:
            raise ProgramError("--durability is snapshot, expected log unless --consistency is bsp and --backups 0: "
                               "other clocks cannot be computed again")

    @property
    def tokens_per_step(self) -> int:
        return self.microbatches * self.batch * self.context

    @property
    def validation_interval(self) -> int:
        return self.validate_every or max(1, self.steps // 10)

    @property
    def checkpoint_interval(self) -> int:
        return self.checkpoint_every or max(1, self.steps // 10)


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


KINDS: dict[str, type] = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str,
                          "str | None": str}


def dashed(name: str) -> str:
    return name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; a flag that is not given does not show up in the parsed arguments."""
    kinds: dict[str, Any] = {**KINDS, "float | None": number_or_none}
    for setting in fields(Settings):
        default = "" if setting.default is None else f" (default: {setting.default})"
        parser.add_argument(f"--{dashed(setting.name)}", type=kinds[str(setting.type)], default=argparse.SUPPRESS,
                            metavar={float: "X", str: "HOW", int: "N"}[KINDS[str(setting.type)]],
                            help=setting.metadata["text"] + default)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    names = {setting.name for setting in fields(Settings)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def expect_effect(settings: Settings, changes: dict[str, Any]) -> None:
    """Refuse flags that were given and would change nothing."""
    for name in changes.keys() & {"durability", "save_every"} if settings.driver == "threads" else ():
        raise ProgramError(f"--{dashed(name)} is {changes[name]}, expected --driver processes or ray with it: threads "
                           "die together, and keep nothing")


def resumed(saved: dict[str, Any], changes: dict[str, Any]) -> Settings:
    """The settings of a resumed run: the saved ones, with the given changes where those are free."""
    known = {setting.name: setting for setting in fields(Settings)}
    for name, value in changes.items():
        if not known[name].metadata["free"] and saved.get(name) != value:
            raise ProgramError(f"--{dashed(name)} is {value}, but the run to resume has {saved.get(name)}; leave it "
                               "out, or start a new run in another folder with --run")
    return Settings(**{name: value for name, value in {**saved, **changes}.items() if name in known})
