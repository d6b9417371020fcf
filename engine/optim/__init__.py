"""Optimization: update rules, optimizers over them, learning rate schedules, clipping, accumulation, loss scaling.

Read rules.py first: it has the equations. An optimizer is a rule and the parameters it works on.
"""

from __future__ import annotations

from engine.optim.accumulator import Accumulated, Accumulator
from engine.optim.clip import clip_grad_norm_, clip_grad_value_
from engine.optim.optimizers import SGD, Adagrad, Adam, AdamW, LazyAdam, Optimizer, RMSprop
from engine.optim.rules import AdagradRule, AdamRule, AdamWRule, RMSpropRule, Rule, SGDRule
from engine.optim.scaler import GradScaler
from engine.optim.schedules import (
    Schedule,
    Scheduler,
    constant,
    cosine,
    exponential,
    linear,
    one_cycle,
    step_decay,
    warmup,
    warmup_cosine,
)

__all__ = ["SGD", "Accumulated", "Accumulator", "Adagrad", "AdagradRule", "Adam", "AdamRule", "AdamW", "AdamWRule",
           "GradScaler", "LazyAdam", "Optimizer", "RMSprop", "RMSpropRule", "Rule", "SGDRule", "Schedule", "Scheduler",
           "clip_grad_norm_", "clip_grad_value_", "constant", "cosine", "exponential", "linear", "one_cycle",
           "step_decay", "warmup", "warmup_cosine"]
