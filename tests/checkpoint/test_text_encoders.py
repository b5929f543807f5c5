"""BERT and DistilBERT directories: classes that wrote them, old names, and what they cannot be."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import TextConfig
from glm_edge.errors import CheckpointError, ConfigError, DataError
from glm_edge.models.text import TextEncoder
from glm_edge.params.tree import nested


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


GOLDEN = Path(__file__).parent / "golden"
SHAPE = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 9,
}
WRITABLE = {
    "BertModel": TextConfig(**SHAPE, pooler="tanh", layer_norm_eps=1e-5),
    "BertForSequenceClassification": TextConfig(**SHAPE, pooler="tanh", num_labels=4),
    "BertForMaskedLM": TextConfig(**SHAPE, type_vocab_size=3),
    "DistilBertModel": TextConfig(**SHAPE, type_vocab_size=0),
    "DistilBertForSequenceClassification": TextConfig(
        **SHAPE, type_vocab_size=0, pooler="relu", num_labels=2
    ),
}


def random_params(model: TextEncoder) -> dict:
    rng = np.random.default_rng(0)
    shapes = expected_shapes(model)
    return nested({path: jnp.asarray(rng.normal(size=shapes[path]) * 0.3) for path in shapes})


def flat(params: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_equal(actual: dict, expected: dict) -> None:
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture
def change(tmp_path):
    """Returns a function that copies a committed case with other fields and tensors."""

    def changed(name: str, fields: dict | None = None, tensors=lambda tensors: tensors) -> Path:
        case = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        stored = json.loads((case / "config.json").read_text()) | (fields or {})
        (case / "config.json").write_text(json.dumps(stored))
        file = SafetensorsFile(case / "model.safetensors")
        arrays = {name: file.read(name) for name in file.tensors}
        write_safetensors(case / "model.safetensors", tensors(arrays))
        return case

    return changed


@pytest.mark.parametrize("architecture", WRITABLE)
def test_what_is_written_is_read(architecture, tmp_path):
    model = TextEncoder(WRITABLE[architecture])
    params = random_params(model)
    ge.save(model, params, tmp_path / "saved", format="hugging_face")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["architectures"] == [architecture]
    again, loaded = ge.load(tmp_path / "saved")
    assert again.config == model.config
    assert_equal(loaded, params)


@pytest.mark.parametrize("architecture", ["BertModel", *(a for a in WRITABLE if "Class" in a)])
def test_transformers_computes_the_same_from_what_is_written(architecture, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = TextEncoder(WRITABLE[architecture])
    params = random_params(model)
    ge.save(model, params, tmp_path / "saved", format="hugging_face")
    reference = getattr(transformers, architecture).from_pretrained(tmp_path / "saved").eval()
    tokens = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (2, 7))
    valid = np.arange(7) < np.array([[7], [3]])
    with torch.no_grad():
        made = reference(torch.as_tensor(tokens), attention_mask=torch.as_tensor(valid).long())
    expected = made.logits if model.config.num_labels else made.pooler_output
    actual, aux = applied(model, {"params": params}, tokens, valid)
    actual = actual if model.config.num_labels else aux["pooled"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_pooler_that_no_class_has_is_saved_in_our_format_only(tmp_path):
    model = TextEncoder(TextConfig(**SHAPE, pooler="relu"))
    params = random_params(model)
    with pytest.raises(CheckpointError, match="Hugging Face cannot store"):
        ge.save(model, params, tmp_path / "saved", format="hugging_face")
    ge.save(model, params, tmp_path / "saved")
    assert ge.load(tmp_path / "saved")[0].config == model.config


@pytest.mark.parametrize(("name", "prefix"), [("bert", "bert."), ("distilbert", "distilbert.")])
def test_old_names_are_read(name, prefix, change):
    old = {".weight": ".gamma", ".bias": ".beta"}

    def renamed(tensors: dict) -> dict:
        results = {}
        for stored, array in tensors.items():
            for new, before in old.items():
                if f"LayerNorm{new}" in stored:
                    stored = stored.replace(new, before)
            results[stored.removeprefix(prefix)] = array
        results["embeddings.position_ids"] = np.arange(16)[None]
        return results

    case = change(name, tensors=renamed)
    assert_equal(ge.load(case)[1], ge.load(GOLDEN / name)[1])


def test_heads_that_predict_words_are_left_out(change):
    def pretrained(tensors: dict) -> dict:
        retained = {name: array for name, array in tensors.items() if "classifier" not in name}
        return retained | {"cls.predictions.bias": np.ones(60, np.float32)}

    case = change("bert", {"architectures": ["BertForMaskedLM"]}, pretrained)
    model, params = ge.load(case)
    assert model.config.pooler is None
    assert model.config.num_labels == 0
    assert not {"pooler", "classifier"} & set(params)


def test_a_file_without_the_pooler_of_its_class_is_refused(change):
    def without(tensors: dict) -> dict:
        return {name: array for name, array in tensors.items() if "pooler" not in name}

    with pytest.raises(CheckpointError, match=r"'bert\.pooler\.dense\.weight' is missing"):
        ge.load(change("bert", tensors=without))


def test_a_classifier_that_its_class_does_not_have_is_refused(change):
    with pytest.raises(CheckpointError, match=r"'classifier\.bias' has no place"):
        ge.load(change("bert", {"architectures": ["BertModel"]}))


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"id2label": {"0": "off", "1": "on", "2": "dim"}}, 3),
        ({"id2label": None}, 2),
        ({"id2label": None, "num_labels": 3}, 3),
    ],
)
def test_labels_are_counted(fields, labels, change):
    def resized(tensors: dict) -> dict:
        return tensors | {
            "classifier.weight": np.ones((labels, 16), np.float32),
            "classifier.bias": np.ones(labels, np.float32),
        }

    assert ge.load(change("bert", fields, resized))[0].config.num_labels == labels


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("bert", "hidden_act", "relu"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "architectures", ["BertForTokenClassification"]),
        ("bert", "id2label", {}),
        ("bert", "pooler_type", "mean"),
        ("bert", "num_attention_heads", 3),
        ("bert", "embedding_size", 8),
        ("distilbert", "activation", "relu"),
        ("distilbert", "architectures", ["DistilBertForQuestionAnswering"]),
        ("distilbert", "dim", None),
    ],
)
def test_what_is_not_known_is_named(name, field, value, change):
    case = change(name, {field: value})
    with pytest.raises(ConfigError, match=field) as error:
        ge.load(case)
    assert str(case / "config.json") in str(error.value)


def test_more_tokens_than_positions_are_refused():
    model = TextEncoder(WRITABLE["BertModel"])
    with pytest.raises(DataError, match="10 per row, this encoder reads up to 9"):
        applied(model, {"params": random_params(model)}, np.zeros((1, 10), int))


def test_text_encoder_padding_and_token_types():
    """Padding changes nothing and token types default to the first."""
    model = TextEncoder(WRITABLE["BertForSequenceClassification"])
    variables = {"params": random_params(model)}
    tokens = np.array([[3, 8, 5, 0, 0]])
    plain = applied(model, variables, tokens[:, :3])[0]
    padded = applied(model, variables, tokens, tokens > 0, np.zeros_like(tokens))[0]
    np.testing.assert_allclose(padded, plain, atol=1e-6)
    typed = applied(model, variables, tokens[:, :3], None, np.array([[0, 1, 1]]))[0]
    assert np.abs(typed - plain).max() > 1e-3
