"""Several threads that share a model get the answers that one thread gets."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from glm_edge import export
from glm_edge.errors import ExportError
from glm_edge.export.verify.runner import SignatureRunner
from glm_edge.export.verify.worker import InterpreterProcess

THREADS, TURNS = 4, 50


@pytest.fixture(params=[False, True], ids=["in this process", "isolated"])
def phone(request, dense_export):
    phone = export.LiteRTRunner(dense_export.path, num_threads=1, isolated=request.param)
    yield phone
    phone.close()


def together(ask):
    """Results of each thread, all of which begin at once."""
    barrier = threading.Barrier(THREADS)

    def work(index):
        barrier.wait()
        return [ask(index) for _ in range(TURNS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def test_run_from_threads_gives_the_right_arrays(phone):
    tokens = np.arange(20, 20 + 32 * THREADS, dtype=np.int32).reshape(THREADS, 1, 32)
    expected = [phone.run("embed_32", tokens=row)["embeddings"] for row in tokens]
    actual = together(lambda index: phone.run("embed_32", tokens=tokens[index])["embeddings"])
    wrong = [not np.array_equal(a, expected[i]) for i, arrays in enumerate(actual) for a in arrays]
    assert sum(wrong) == 0


def test_generate_from_threads_gives_the_right_tokens(phone):
    prompts = np.arange(30, 30 + 8 * THREADS).reshape(THREADS, 8)
    expected = [phone.generate(prompt, max_new_tokens=6) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 1
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda prompt: phone.generate(prompt, max_new_tokens=6), prompts))
    assert results == expected


def test_close_waits_for_another_thread(dense_export):
    child, outcomes = InterpreterProcess(dense_export.path, num_threads=1), []

    def ask():
        try:
            while True:
                child.run("embed", {"tokens": np.array([[30]], np.int32)})
                outcomes.append("answered")
        except ExportError as error:
            outcomes.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not outcomes:
        pass
    child.close()
    thread.join()
    assert outcomes[-1].endswith("its process has ended; load the file again")


def test_looking_at_all_slots_leaves_the_model_as_it_is(model):
    phone = SignatureRunner(model.config, (8,), 64, attended_slots=(16, 32))
    assert phone.looking_at_all_slots().attended(0, 8) is None
    assert phone.attended(0, 8) == 16
