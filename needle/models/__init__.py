"""Models that people train, each in a file of its own: lstm.py."""

from needle.models.lstm import LSTMLanguageModel as LSTMLanguageModel
