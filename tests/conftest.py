"""What all tests share."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Frees a module's programs: each keeps pages mapped, and a process may map only so many."""
    yield
    jax.clear_caches()
    gc.collect()
