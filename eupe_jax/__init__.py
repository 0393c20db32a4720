"""Multi-teacher distillation of efficient universal perception encoders in JAX."""

__version__ = "0.1.0"
