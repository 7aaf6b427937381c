"""Optimizers, gradient clipping and learning rate schedules.

Read options.py (what numbers may be), clipping.py, optimizer.py (the base), rules.py (the
optimizers), scaling.py (of losses), schedules.py. The arithmetic of the updates stands in
needle/ops/update.py.
"""

# fmt: off
# isort: off
from needle.optim.clipping import clip_grad_norm, clip_grad_value
from needle.optim.optimizer import Optimizer, ParameterGroup
from needle.optim.rules import SGD, Adafactor, Adagrad, Adam, AdamW, Lion, RMSprop
from needle.optim.scaling import GradScaler
from needle.optim.schedules import (
    ConstantLR, CosineLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, Schedule, StepLR,
)
