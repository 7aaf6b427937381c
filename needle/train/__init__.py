"""Training runs: their configuration, folder, checkpoints and metrics, and the Trainer.

    from needle.train import TrainConfig, Trainer
    Trainer.start(TrainConfig.for_data("digits"), name="first").fit()

Read config.py, model.py, metrics.py, image.py, folder.py, trainer.py; underneath lies
needle/files.py.
"""

# fmt: off
# isort: off
from needle.train.config import TASKS, Task, TrainConfig, open_data
from needle.train.folder import (create_run, load_checkpoint, load_model, open_run,
                                 save_checkpoint, save_model)
from needle.train.image import read_image
from needle.train.metrics import MetricsFile, Progress, draw_curves, read_metrics
from needle.train.model import Evaluation, class_probabilities, evaluate, make_model
from needle.train.trainer import Interrupted, Trainer
