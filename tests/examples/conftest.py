"""What tests of several examples need."""

import jax
import pytest


@pytest.fixture
def rank_promotion():
    """Tunix's models promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield
