"""Operations as users write them, several hundred, shared by the test of operations and by sweeps.

Every case is small. Inputs are drawn from a seed that the name gives, so that a case alone and a case among others are the same.
"""

from __future__ import annotations

import torch

from operation_cases import elementwise, maps, movements, products  # noqa: F401 - they fill the table
from operation_cases.draw import CASES, X, case, inputs_of

__all__ = ["CASES", "NOT_YET", "REFUSED", "inputs_of"]

case("random numbers", lambda x: x + torch.randn_like(x), X)
# refused, with a message
REFUSED = {"lgamma", "digamma", "erfinv", "mvlgamma", "i0", "log_ndtr", "random numbers"}
# not compiled yet, or wrong (then the comparison with torch refuses the module); `pytest -m sweep` tries them all
NOT_YET = {"max_pool2d indices", "nn.LSTM proj", "nn.EmbeddingBag", "zero dim double with float"}
