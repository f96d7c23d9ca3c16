"""The hyperparameters of a model, read strictly from a config.json."""

from .config import Config as Config
from .config import interpret as interpret
