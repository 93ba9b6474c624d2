"""LAVISH: a frozen vision transformer that reads video and sound through latent-token adapters."""

from lavish_fast.config import Config
from lavish_fast.model import Model

__all__ = ["Config", "Model"]
__version__ = "0.1.0"
