"""How numbers print in the examples of the documentation."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def print_four_digits(request):
  """Examples show what matters; the last digits vary with the processor."""
  if not isinstance(request.node, pytest.DoctestItem):
    yield
    return
  with np.printoptions(precision=4, suppress=True):
    yield
