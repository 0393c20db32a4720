"""Multi-teacher distillation of efficient universal perception encoders in JAX."""

__version__ = "0.1.0"
__all__ = ["load_encoder"]


def __getattr__(name: str):
    # Late, so that importing one model file does not load Orbax.
    if name == "load_encoder":
        from eupe_jax.training.encoders import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
