"""The peer of the decoding benchmark on the weights of a checkpoint."""

import jax
import numpy as np
import pytest

from experiments.bench import decode
from glm_edge import params as boxes
from tests.tiny_models import init_away_from_constants, tiny_config


@pytest.mark.parametrize("tied", [True, False])
def test_set_params_copies_a_checkpoint_to_transformers(tied):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`")
    pytest.importorskip("transformers", reason="needs the extra `reference`")
    config = decode.text_only(tiny_config({"tie_embeddings": tied}))
    model = decode.MultimodalGLM(config)
    params = init_away_from_constants(model, np.zeros((1, 2), np.int32))
    peer = decode.Transformers(config, "float32", 1, seed=0)
    peer.set_params(params)
    copied = dict(boxes.path_items(peer.params()))
    for path, leaf in boxes.path_items(params):
        np.testing.assert_array_equal(copied[path], leaf)
    tokens = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = peer.model(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(model.apply)({"params": params}, tokens)[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
