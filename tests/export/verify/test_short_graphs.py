"""Graphs of ONNX and MNN with logits of their last token, and prefixes of their directories."""

from importlib.util import find_spec

import numpy as np
import pytest

from glm_edge import export
from glm_edge.errors import DataError, ExportError
from glm_edge.export.verify.graph_directory import GraphDirectoryRunner

SLOTS = 32
MODULES = {"onnx": ("onnx", "onnxruntime"), "mnn": ("onnx", "MNN")}


@pytest.fixture(params=MODULES)
def directory(request, text_model, text_params, tmp_path):
    """An exported directory of the small text model."""
    if not all(map(find_spec, MODULES[request.param])):
        pytest.skip(f"the extra {request.param} is not installed")
    write = getattr(export, request.param)
    return write(text_model, text_params, tmp_path / "a", (), SLOTS, forced_lengths=(4,))


def test_short_graphs_and_prefixes_give_the_logits_of_single_tokens(directory, tmp_path):
    assert directory.signatures == ("embed", "decode", "embed_4", "prefill_4")
    phone, tokens, used = GraphDirectoryRunner(directory.path), np.arange(20, 31), []
    expected = phone.score(tokens)[-1]
    prefix = phone.keep_prefix(tokens[:5], phone.prefix_path(tokens[:5]))
    assert prefix.path.parent == tmp_path
    run = phone.run
    phone.run = lambda name, **inputs: used.append(name) or run(name, **inputs)
    for beginning in (None, prefix):
        used.clear()
        logits, _ = phone.prefill(tokens, prefix=beginning)
        np.testing.assert_allclose(logits[0], expected, atol=1e-4)
        steps = [name for name in used if "embed" not in name]
        assert steps == ["prefill_4"] * (3 if beginning is None else 2)
    phone.close()
    (directory.path / "weights.bin").write_bytes(b"other")
    other = GraphDirectoryRunner(directory.path)
    with pytest.raises(ExportError, match="the prefix of another model"):
        other.prefill(tokens, prefix=prefix)
    with pytest.raises(DataError, match="has no signature 'prefill_3'; it has decode, embed, "):
        other.run("prefill_3")
    other.close()
