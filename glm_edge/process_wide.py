"""Thread-safe changes of process-wide state, such as standard error."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

# TensorFlow's C++ reads both on import: level 3 logs only fatal errors, and oneDNN prints a notice
# unless it is disabled.
QUIET_TENSORFLOW = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def shared(
    change: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Make a process-wide change safe for concurrent threads.

    The first thread applies the change and the last one reverts it. Otherwise, a thread that enters
    during the change would save the changed value and later restore it permanently.

    Args:
      change: function that returns a context manager, which applies the change on entry and reverts
        it on exit. It receives no exceptions.

    Returns:
      A function like `change`, for any count of threads.
    """
    # A finalizer may run on the thread that holds the lock.
    lock = threading.RLock()
    depth, active = 0, contextlib.ExitStack()

    @functools.wraps(change)
    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        nonlocal depth
        with lock:
            if not depth:
                active.enter_context(change())
            depth += 1
        try:
            yield
        finally:
            with lock:
                depth -= 1
                if not depth:
                    active.close()

    return entered
