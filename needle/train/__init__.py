"""Training runs: their configuration, folder, checkpoints and metrics, and the Trainer.

    from needle.train import TrainConfig, Trainer
    Trainer.start(TrainConfig.for_data("digits"), name="first").fit()

Read config.py, image.py, task.py, model.py, metrics.py, folder.py, generate.py, trainer.py;
underneath lies needle/files.py.
"""

# fmt: off
# isort: off
from needle.train.config import LANGUAGE_MODELS, TrainConfig
from needle.train.folder import (create_run, load_checkpoint, load_model, load_vocabulary, open_run,
                                 save_checkpoint, save_model)
from needle.train.generate import write_text
from needle.train.image import read_image
from needle.train.metrics import MetricsFile, Progress, draw_curves, read_metrics
from needle.train.model import Evaluation, class_probabilities, evaluate, make_model
from needle.train.task import (TASKS, Task, TextDataset, make_tokenizer, measures, open_data,
                               task_of)
from needle.train.trainer import Interrupted, Trainer
