"""Text encoders: BERT (`bert`) and DistilBERT (`distilbert`), with or without a classifier."""

from typing import Any

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import FamilyMember, TensorMapping, same
from glm_edge.configs import TextConfig
from glm_edge.errors import ConfigError
from glm_edge.models.text import TextEncoder

BOTH = ("weight", "bias")
BUFFERS = r".*embeddings\.(position_ids|token_type_ids)"
# DistilBERT's config.json has no field for the epsilon of its norms.
DISTILBERT_EPS = 1e-12

# Pooler and presence of a classifier by class; heads that predict words or sentences are not read.
_BERT_CLASSES = {
    "BertModel": ("tanh", False),
    "BertForSequenceClassification": ("tanh", True),
    "BertForPreTraining": ("tanh", False),
    "BertForMaskedLM": (None, False),
}
_DISTILBERT_CLASSES = {
    "DistilBertModel": (None, False),
    "DistilBertForSequenceClassification": ("relu", True),
    "DistilBertForMaskedLM": (None, False),
}
_BERT_LAYER = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "q_proj": "attention.q_lin",
    "k_proj": "attention.k_lin",
    "v_proj": "attention.v_lin",
    "o_proj": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "fc1": "ffn.lin1",
    "fc2": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
# Fields of training, and of poolers that no class of `_BERT_CLASSES` has.
_BERT_UNUSED = (
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "hidden_dropout_prob",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "tie_word_embeddings",
)
_DISTILBERT_UNUSED = (
    "output_past",
    "qa_dropout",
    "seq_classif_dropout",
    "sinusoidal_pos_embds",
    "tie_weights_",
    "tie_word_embeddings",
)


def _written_by(
    fields: Fields, classes: dict[str, tuple[str | None, bool]]
) -> tuple[str | None, int]:
    """Read pooler and count of labels of the file's class, by default the first class."""
    names = fields.take("architectures") or [next(iter(classes))]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in classes:
        raise ConfigError(
            f"{fields.where}: field 'architectures' is {names!r:.60}, which is unsupported; it "
            f"must be one of {', '.join(classes)}"
        )
    pooler, classifies = classes[names[0]]
    return pooler, _num_labels(fields) if classifies else 0


def _num_labels(fields: Fields) -> int:
    labels = fields.take("id2label")
    if labels is None:
        # transformers does not write its default of two labels.
        return fields.get("num_labels", int, 2)
    if not isinstance(labels, dict) or not labels:
        raise ConfigError(
            f"{fields.where}: field 'id2label' must be an object with one field per label"
        )
    return len(labels)


def _class_of(config: TextConfig, classes: dict[str, tuple[str | None, bool]]) -> dict[str, Any]:
    """Write the fields that `_written_by` reads."""
    wanted = (config.pooler, config.num_labels > 0)
    names = [name for name, made in classes.items() if made == wanted]
    if not names:
        raise ConfigError(
            f"no class of transformers has pooler {config.pooler!r} and {config.num_labels} labels"
        )
    fields: dict[str, Any] = {"architectures": names[:1]}
    if config.num_labels:
        labels = [f"LABEL_{index}" for index in range(config.num_labels)]
        fields["id2label"] = {str(index): label for index, label in enumerate(labels)}
        fields["label2id"] = {label: index for index, label in enumerate(labels)}
    return fields


def _encoder_entries(
    config: TextConfig, prefix: str, layers: str, layer_names: dict[str, str]
) -> list[TensorMapping]:
    embeddings = f"{prefix}embeddings"
    entries = same("embed", f"{embeddings}.word_embeddings")
    entries.append(TensorMapping(("position",), (f"{embeddings}.position_embeddings.weight",)))
    entries += same("norm", f"{embeddings}.LayerNorm", *BOTH)
    for layer in range(config.num_layers):
        for name, stored in layer_names.items():
            entries += same(f"layers/{layer}/{name}", f"{prefix}{layers}.{layer}.{stored}", *BOTH)
    return entries + (same("classifier", "classifier", *BOTH) if config.num_labels else [])


def _read_bert(fields: Fields, name: str) -> TextConfig:
    fields.expect("hidden_act", "gelu", default="gelu")
    fields.expect("position_embedding_type", "absolute")
    fields.expect("directionality", "bidi")
    fields.expect("pooler_type", "first_token_transform")
    for decoding in ("is_decoder", "add_cross_attention"):
        fields.expect(decoding, False)
    for unused in _BERT_UNUSED:
        fields.take(unused)
    pooler, num_labels = _written_by(fields, _BERT_CLASSES)
    hidden = fields.get("hidden_size", int)
    return TextConfig(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        num_layers=fields.get("num_hidden_layers", int),
        num_heads=fields.divisor("num_attention_heads", "hidden_size", hidden),
        intermediate_size=fields.get("intermediate_size", int),
        max_position_embeddings=fields.get("max_position_embeddings", int, 512),
        type_vocab_size=fields.get("type_vocab_size", int, 2),
        layer_norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        num_labels=num_labels,
        pooler=pooler,
    )


def _write_bert(config: TextConfig) -> dict[str, Any]:
    return {
        **_class_of(config, _BERT_CLASSES),
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
    }


def _bert_entries(config: TextConfig) -> list[TensorMapping]:
    entries = _encoder_entries(config, "bert.", "encoder.layer", _BERT_LAYER)
    entries += same("token_type", "bert.embeddings.token_type_embeddings")
    return entries + (same("pooler", "bert.pooler.dense", *BOTH) if config.pooler else [])


def _bert_ignored(config: TextConfig) -> str:
    # Published models of this class come from pre-training and also store its pooler.
    unread = rf"{BUFFERS}|cls\..*"
    return unread if config.pooler else rf"{unread}|bert\.pooler\..*"


_RENAMED_NORM = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)

BERT = FamilyMember(
    read_config=_read_bert,
    write_config=_write_bert,
    build=TextEncoder,
    entries=_bert_entries,
    renames=(*_RENAMED_NORM, (r"^(embeddings|encoder|pooler)\.", r"bert.\1.")),
    ignored=_bert_ignored,
)


def _read_distilbert(fields: Fields, name: str) -> TextConfig:
    fields.expect("activation", "gelu", default="gelu")
    for unused in _DISTILBERT_UNUSED:
        fields.take(unused)
    pooler, num_labels = _written_by(fields, _DISTILBERT_CLASSES)
    hidden = fields.get("dim", int)
    return TextConfig(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        num_layers=fields.get("n_layers", int),
        num_heads=fields.divisor("n_heads", "dim", hidden),
        intermediate_size=fields.get("hidden_dim", int),
        max_position_embeddings=fields.get("max_position_embeddings", int, 512),
        type_vocab_size=0,
        layer_norm_eps=DISTILBERT_EPS,
        num_labels=num_labels,
        pooler=pooler,
    )


def _write_distilbert(config: TextConfig) -> dict[str, Any]:
    return {
        **_class_of(config, _DISTILBERT_CLASSES),
        "model_type": "distilbert",
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.intermediate_size,
        "activation": "gelu",
        "max_position_embeddings": config.max_position_embeddings,
    }


def _distilbert_entries(config: TextConfig) -> list[TensorMapping]:
    entries = _encoder_entries(config, "distilbert.", "transformer.layer", _DISTILBERT_LAYER)
    return entries + (same("pooler", "pre_classifier", *BOTH) if config.pooler else [])


DISTILBERT = FamilyMember(
    read_config=_read_distilbert,
    write_config=_write_distilbert,
    build=TextEncoder,
    entries=_distilbert_entries,
    renames=(*_RENAMED_NORM, (r"^(embeddings|transformer)\.", r"distilbert.\1.")),
    ignored=lambda config: rf"{BUFFERS}|vocab_(transform|layer_norm|projector)\..*",
)
