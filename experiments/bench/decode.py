"""Times prefill and decoding of one prompt, compared with transformers on the same CPU.

    python -m experiments.bench.decode --shape=glm_edge_1_5b --dtype=float32 --out=decode.json

Both sides use the same weights (one copy in memory) and batch size 1: random ones of --shape, or
those of --checkpoint. They alternate in each
round; a ratio above 1 means that glm_edge is faster. A prefill is timed until the first token is
available, a decoding step until the next token is.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import numpy as np
from absl import flags

import glm_edge as ge
from experiments.common.provenance import provenance_of
from glm_edge import generate
from glm_edge import params as boxes
from glm_edge.checkpoint.hugging_face.decoders import decoder_entries
from glm_edge.cli.checkpoints import NAMED, checkpoint_of
from glm_edge.cli.console import launch, print_table
from glm_edge.cli.corpora import write_text
from glm_edge.configs import GLMConfig, preset
from glm_edge.errors import CheckpointError, require
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import nested

SHAPES = {"tiny": "tiny", "mobile": "mobile", "glm_edge_1_5b": "large"}
# Threads of torch spin for a while after their work, and would slow the next measurement.
PAUSE_S = 0.3

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_enum("shape", "mobile", list(SHAPES), "Shape of the decoder.")
    flags.DEFINE_string(
        "checkpoint", None, f"Model instead of --shape: a path, or {', '.join(NAMED)}."
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the weights.")
    flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "Arithmetic of glm_edge.")
    flags.DEFINE_list("prompts", ["128", "512"], "Prompt lengths in tokens.")
    flags.DEFINE_integer("decode_tokens", 16, "Decoding steps timed after each prefill.", 1)
    flags.DEFINE_integer("rounds", 7, "Number of alternations of the two sides.", 2)
    flags.DEFINE_integer("threads", 2, "Number of torch threads; JAX uses all available cores.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of weights and prompts.")
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")


def main(argv: Sequence[str]) -> None:
    del argv
    stored = None
    if FLAGS.checkpoint:
        model, stored = ge.load(checkpoint_of(FLAGS.checkpoint), dtype=FLAGS.dtype)
        if not isinstance(model, MultimodalGLM):
            raise CheckpointError(f"--checkpoint={FLAGS.checkpoint}: has no decoder")
        config = text_only(model.config)
    else:
        config = text_only(preset(SHAPES[FLAGS.shape]))
    peer = Transformers(config, FLAGS.dtype, FLAGS.threads, FLAGS.seed)
    if stored is not None:
        peer.set_params(stored)
    ours = Ours(MultimodalGLM(config, FLAGS.compute), peer.params())
    rng = np.random.default_rng(FLAGS.seed)
    vocabulary = config.decoder.vocab_size if FLAGS.checkpoint else min(config.eos_token_ids)
    prompts = {int(n): rng.integers(0, vocabulary, (1, int(n))) for n in FLAGS.prompts}
    first, same = {}, {}
    for length, prompt in prompts.items():
        tokens, first[length] = zip(*ours.run(prompt, FLAGS.decode_tokens + 1), strict=True)
        expected, _ = zip(*peer.run(prompt, FLAGS.decode_tokens + 1), strict=True)
        same[length] = sum(a == b for a, b in zip(tokens, expected, strict=True)) / len(tokens)
    seconds = measure(ours, peer, prompts)
    rows = [row for n in prompts for row in summarize(n, seconds[n], first[n])]
    print_table(list(rows[0]), [[_shown(v) for v in row.values()] for row in rows])
    print(f"same greedy tokens: {same}; load average {os.getloadavg()[0]:.1f}")
    if FLAGS.out:
        log = provenance(peer) | {"same_tokens": same, "results": rows}
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", FLAGS.overwrite)


def provenance(peer: "Transformers") -> dict[str, Any]:
    """Describe the run and the peer."""
    flags_used = (
        "checkpoint",
        "shape",
        "dtype",
        "compute",
        "rounds",
        "decode_tokens",
        "threads",
        "seed",
    )
    return provenance_of("bench.decode", flags_used, versions=peer.versions)


def text_only(config: GLMConfig) -> GLMConfig:
    """Return the same decoder without its encoders."""
    return dataclasses.replace(
        config, vision=None, speech=None, image_token_id=None, audio_token_id=None
    )


class Ours:
    """Greedy decoding by `glm_edge.generate.stream`."""

    def __init__(self, model: MultimodalGLM, params: Any):
        self.model, self.params = model, params

    def run(self, prompt: np.ndarray, count: int) -> list[tuple[int, float]]:
        """Generate tokens; return each with its seconds."""
        options = {"max_new_tokens": count, "stop_tokens": ()}
        tokens = generate.stream(self.model, self.params, prompt, **options)
        return timed(lambda: int(next(tokens)[0]), count)


class Transformers:
    """Greedy decoding by transformers' GlmForCausalLM, called directly, without `generate`."""

    def __init__(self, config: GLMConfig, dtype: str, threads: int, seed: int):
        self.torch = require("torch", extra="reference")
        transformers = require("transformers", extra="reference")
        self.versions = {n.__name__: n.__version__ for n in (self.torch, transformers)}
        self.torch.set_num_threads(threads)
        self.torch.manual_seed(seed)
        self.decoder = decoder = config.decoder
        self.model = transformers.GlmForCausalLM._from_config(
            transformers.GlmConfig(
                vocab_size=decoder.vocab_size,
                hidden_size=decoder.hidden_size,
                intermediate_size=decoder.intermediate_size,
                num_hidden_layers=decoder.num_layers,
                num_attention_heads=decoder.num_heads,
                num_key_value_heads=decoder.num_kv_heads,
                head_dim=decoder.head_dim,
                rms_norm_eps=decoder.rms_norm_eps,
                attention_bias=decoder.attention_bias,
                tie_word_embeddings=decoder.tie_embeddings,
                max_position_embeddings=decoder.max_position_embeddings,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": decoder.rope_theta,
                    "partial_rotary_factor": decoder.partial_rotary_factor,
                },
                pad_token_id=None,
                eos_token_id=None,
            ),
            dtype=getattr(self.torch, dtype),
        ).eval()

    def set_params(self, params: Any) -> None:
        """Copy glm_edge's parameters."""
        leaves = dict(boxes.path_items(params))
        with self.torch.no_grad():
            for path, weight in self._weights().items():
                weight.copy_(self.torch.from_dlpack(leaves[path]))

    def params(self) -> dict[str, Any]:
        """Return its weights as glm_edge parameters, in the same memory."""
        read = jax.dlpack.from_dlpack
        return nested({path: read(w.detach()) for path, w in self._weights().items()})

    def _weights(self) -> dict[str, Any]:
        """Return its weights by the paths of glm_edge's parameters."""
        weights = dict(self.model.named_parameters())
        entries = decoder_entries(self.decoder, "model.", "lm_head")
        return {entry.paths[0]: weights[entry.names[0]] for entry in entries}

    def run(self, prompt: np.ndarray, count: int) -> list[tuple[int, float]]:
        """Generate tokens; return each with its seconds."""
        state = {"input_ids": self.torch.as_tensor(prompt), "past_key_values": None}

        def step() -> int:
            output = self.model(**state, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1)
            state.update(input_ids=token[:, None], past_key_values=output.past_key_values)
            return int(token)

        with self.torch.inference_mode():
            return timed(step, count)


def timed(step: Callable[[], int], count: int) -> list[tuple[int, float]]:
    """Return the results of `count` calls, each with its seconds."""
    results = []
    for _ in range(count):
        start = time.perf_counter()
        token = step()
        results.append((token, time.perf_counter() - start))
    return results


def measure(
    ours: Ours, peer: Transformers, prompts: dict[int, np.ndarray]
) -> dict[int, dict[str, list[tuple[float, float]]]]:
    """Measure pairs (glm_edge, transformers) of seconds by prompt length, per phase."""
    seconds = {length: {"prefill": [], "decode": []} for length in prompts}
    for turn in range(FLAGS.rounds):
        for length, prompt in prompts.items():
            sides = {}
            for side in (ours, peer) if turn % 2 else (peer, ours):
                time.sleep(PAUSE_S)
                sides[side] = [s for _, s in side.run(prompt, FLAGS.decode_tokens + 1)]
            pair = sides[ours], sides[peer]
            seconds[length]["prefill"].append(tuple(s[0] for s in pair))
            seconds[length]["decode"].append(tuple(statistics.median(s[1:]) for s in pair))
    return seconds


def summarize(
    length: int, seconds: dict[str, list[tuple[float, float]]], first: Sequence[float]
) -> list[dict[str, Any]]:
    """Return one row for prefill and one for decoding.

    Args:
      length: prompt length in tokens.
      seconds: seconds from `measure`.
      first: seconds of glm_edge's first tokens, which include compilation of prefill and step.

    Returns:
      Milliseconds of both sides, their ratio with quartiles, and glm_edge's compilation seconds.
    """
    rows = []
    for (phase, pairs), compiling in zip(seconds.items(), first, strict=False):
        ours, peer = (np.array(side) * 1e3 for side in zip(*pairs, strict=True))
        ratio = np.quantile(peer / ours, [0.25, 0.5, 0.75])
        rows.append(
            {
                "phase": f"{phase} {length}" if phase == "prefill" else f"{phase} after {length}",
                "ours_ms": float(np.median(ours)),
                "transformers_ms": float(np.median(peer)),
                "ratio": float(ratio[1]),
                "ratio_quartiles": [float(ratio[0]), float(ratio[2])],
                "compile_s": compiling - float(np.median(ours)) / 1e3,
            }
        )
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " - ".join(_shown(v) for v in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    define_flags()
    launch(main)
