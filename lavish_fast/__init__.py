"""LAVISH: a frozen vision transformer that reads video and sound through latent-token adapters."""

from lavish_fast.config import Config

__all__ = ["Config", "Model", "TrainingStep", "explain", "optimize"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # torch takes seconds to import: only who asks for the model waits for it.
    if name == "Model":
        from lavish_fast.model import Model

        return Model
    if name == "TrainingStep":
        from lavish_fast.step import TrainingStep

        return TrainingStep
    if name in ("explain", "optimize"):
        from lavish_fast import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
