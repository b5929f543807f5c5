"""Measures the stages of the main job on its evaluation data: rows of the table."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glm_edge as ge
from experiments.common import exported_eval, tap_eval
from experiments.common.eval_data import EvalData
from experiments.nano.phone_screens import metrics
from glm_edge import params as params_lib
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.cli.console import bar
from glm_edge.cli.loss import exported_text_loss, text_loss
from glm_edge.models.glm import init_cache

LATENCY_STEPS = 40
LATENCY_CONTEXT = 128
KINDS = {"written": "tap_in_box_text", "spoken": "tap_in_box_speech"}


@dataclasses.dataclass
class StageEval:
    """Measurements of all stages on the same data.

    Attributes:
      data: to measure on.
      hits: of each stage and kind, one 0 or 1 per question, in the order measured.
    """

    data: EvalData
    hits: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)

    def measure(
        self,
        stage: str,
        model: Any,
        params: Any,
        reference: tuple[Any, Any] | None = None,
    ) -> dict[str, Any]:
        """Measure one stage, which is one row of the table."""
        taps = {
            kind: tap_eval.answers(
                model, params, self.data.tokenizer, items, bar(f"{stage}, {kind}")
            )
            for kind, items in (("written", self.data.written), ("spoken", self.data.spoken))
            if items
        }
        text = text_loss(model, params, self.data.windows, reference)
        return self._row(stage, params, text, taps, decode_latency_ms(model, params))

    def measure_exported(
        self, exported: Any, reference: tuple[Any, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measure an exported file by running it; return its row, and the comparison with JAX."""
        phone = ge.export.LiteRTModel(exported.path)
        taps = {
            kind: exported_eval.answers(phone, self.data.tokenizer, items, f"exported, {kind}")
            for kind, items in (("written", self.data.written), ("spoken", self.data.spoken))
            if items
        }
        text = exported_text_loss(phone, self.data.windows, reference)
        latency_ms = exported_eval.decode_latency_ms(phone)
        row = self._row("exported", exported.params, text, taps, latency_ms)
        items, texts = [], []
        for kind, answered in taps.items():
            items += getattr(self.data, kind)[: exported_eval.VERIFY_ITEMS // 2]
            texts += answered[: exported_eval.VERIFY_ITEMS // 2]
        windows = exported_eval.verification_windows(
            phone.config, self.data.tokenizer, self.data.windows, items, texts
        )
        result = exported.verify(windows, check=False)
        agreement = {
            "agreement": result.agreement,
            "tokens": result.tokens,
            "max_abs_error": result.max_abs_error,
            "mean_kl": result.mean_kl,
            "free_running_agreement": result.free_running_agreement,
            "free_running_tokens": result.free_running_tokens,
            "file_bytes": exported.file_bytes,
            "stored_bytes": exported.stored_bytes,
            "conversions": [str(conversion) for conversion in exported.conversions],
        }
        return row, agreement

    def _row(self, stage, params, text, taps, latency_ms) -> dict[str, Any]:
        count, stored = params_lib.count(params), params_lib.stored_bytes(params)
        rates: dict[str, float | None] = dict.fromkeys(KINDS.values())
        self.hits[stage] = {}
        for kind, texts in taps.items():
            hits = tap_eval.hits(getattr(self.data, kind), texts)
            self.hits[stage][kind] = hits
            rates[KINDS[kind]] = float(np.mean(hits)) if hits else None
        return {
            "stage": stage,
            "parameters": count,
            "bytes": stored,
            "bits_per_weight": 8 * stored / count,
            **text,
            **rates,
            "ms_per_token": latency_ms,
        }

    def tap_loss(self, first: str = "dense", last: str = "quantized") -> dict[str, Any] | None:
        """Compute the taps lost by compression on the same screens, with their interval."""
        if not self.hits.get(first) or last not in self.hits:
            return None
        return {
            kind: vars(metrics.paired_difference(self.hits[last][kind], hits))
            for kind, hits in self.hits[first].items()
        }


def decode_latency_ms(model: Any, params: Any) -> float:
    """Measure the median milliseconds of one greedy step of one row at `LATENCY_CONTEXT`."""
    cache = init_cache(model.config.decoder, 1, 2 * LATENCY_CONTEXT)
    cache["length"] = jnp.int32(LATENCY_CONTEXT)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, token, cache):
        logits, aux = model.apply({"params": params}, token, cache=cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), aux["cache"]

    token = jnp.zeros((1, 1), jnp.int32)
    seconds = []
    for _ in range(LATENCY_STEPS):
        start = time.perf_counter()
        token, cache = step(params, token, cache)
        token.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[5:]))


def opened(directory: str | None) -> tuple[Path, Any, Any]:
    """Return the directory of `checkpoint_of`, its model in float32, and the parameters."""
    checkpoint = checkpoint_of(directory)
    return checkpoint, *ge.load(checkpoint, dtype="float32")
