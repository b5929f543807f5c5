"""What all tests share."""

import gc
from pathlib import Path

import jax
import pytest

# Folders whose tests are of many small programs, which take longer to optimize than to run. In the
# others programs are compiled as a user's are.
COMPILED_QUICKLY = ("checkpoint", "compress", "models", "params")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(request):
    """Frees a module's programs: each keeps pages mapped, and a process may map only so many."""
    folder = Path(request.node.path).relative_to(Path(__file__).parent).parts[0]
    jax.config.update("jax_disable_most_optimizations", folder in COMPILED_QUICKLY)
    yield
    jax.clear_caches()
    gc.collect()
