"""The hyperparameters of a model, read strictly from a config.json."""

from .config import Config as Config, interpret as interpret
