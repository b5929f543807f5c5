"""Changes of the whole process, such as of standard error, that threads make at the same time."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

# TensorFlow's C++ reads both when it is imported: 3 is fatal errors alone, and oneDNN announces
# itself unless it is off.
QUIET_TENSORFLOW = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def shared(
    change: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes a change of the process safe where several threads ask for it.

    The first thread makes the change and the last one takes it back. Without that, a thread that
    begins while another one is inside remembers the changed value, and restores that one for good.

    Args:
      change: gives a context manager that makes the change, and takes it back at its end. It is
        not told of exceptions.

    Returns:
      A function like `change`, for any number of threads.
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
