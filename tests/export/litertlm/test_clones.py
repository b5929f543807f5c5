"""Clones of LiteRT-LM's conversations, which share a context that is prefilled once."""

from importlib.util import find_spec

import pytest

from glm_edge.errors import ExportError
from glm_edge.export.verify.worker import InterpreterProcess
from glm_edge.export.verify.worker_main import clone_conversation

if not (find_spec("litert_lm") and find_spec("litert_lm_builder")):
    pytest.skip("the extra litertlm is not installed", allow_module_level=True)

SYSTEM = " ".join(f"w{index:03d}" for index in range(20, 44))
QUESTIONS = ("w050 w060", "w070", "w080 w090 w100", "w050 w060")
TOKENS = 6


@pytest.fixture(scope="module")
def engine(text_bundle, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    process = InterpreterProcess(
        text_bundle.path, runtime="litertlm", images=0, audio=False, cache_dir=cache
    )
    yield process
    process.close()


def test_clones_answer_as_fresh_conversations(engine):
    fresh = []
    for question in QUESTIONS:
        engine.reply(SYSTEM, TOKENS)
        fresh.append(engine.reply(question, TOKENS, same=True))
    first = engine.reply(SYSTEM, TOKENS)
    clones = [engine.branch(question) for question in QUESTIONS]
    assert clones == fresh
    assert len({text for text, _ in clones}) > 1
    # The conversation itself goes on as if there had been no clone.
    assert engine.reply(QUESTIONS[0], TOKENS, same=True) == fresh[0]
    assert first[1] < fresh[0][1]


def test_there_must_be_a_conversation_to_clone(text_bundle, tmp_path):
    process = InterpreterProcess(
        text_bundle.path, runtime="litertlm", images=0, audio=False, cache_dir=str(tmp_path)
    )
    with pytest.raises(ExportError, match="no conversation to clone; send a message first"):
        process.branch("w050")
    process.close()


def test_messages_of_a_new_conversation_are_not_prefilled(text_bundle, tmp_path):
    """A property of litert-lm 0.18.1: clones of such a conversation save nothing."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    cpu = litert_lm.Backend.CPU(thread_count=1)
    engine = litert_lm.Engine(
        str(text_bundle.path), cpu, cache_dir=str(tmp_path), enable_benchmark=True
    )
    sampler = litert_lm.SamplerConfig(top_k=1, top_p=0.0, temperature=1.0)

    def conversation(**options):
        return engine.create_conversation(
            sampler_config=sampler, max_output_tokens=TOKENS, **options
        )

    def prefilled(base):
        clone = clone_conversation(engine, base)
        clone.send_message({"role": "user", "content": QUESTIONS[1]})
        count = clone.get_benchmark_info().last_prefill_token_count
        clone.close()
        return count

    told = [{"role": "user", "content": SYSTEM}, {"role": "assistant", "content": "w001"}]
    promised, asked = conversation(messages=told), conversation()
    asked.send_message({"role": "user", "content": SYSTEM})
    assert promised.token_count == 0
    assert asked.token_count >= len(SYSTEM.split())
    assert prefilled(promised) > len(SYSTEM.split())
    assert prefilled(asked) < 6
    for each in (promised, asked, engine):
        each.close()
