"""Weights in and out of the project: PyTorch, Orbax, ExecuTorch."""

import logging

for _name in ("torchao", "torch.utils._pytree"):  # what they say on import concerns no conversion
    logging.getLogger(_name).setLevel(logging.ERROR)
