"""generate: continue a prompt with an artifact, streaming text as it comes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TextIO

from liftc.driver.evaluate import load_any
from liftc.errors import LiftcError
from liftc.runtime.tokenizer import StreamDecoder, Tokenizer


def generate_text(
    artifact: Path,
    prompt: str,
    *,
    chat: bool = False,
    device: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    echo: TextIO | None = None,
) -> dict[str, Any]:
    """Generate and return {"completion", "tokens", "prompt_tokens", "ttft_ms", "tokens_per_second"}.

    tokens_per_second counts the tokens after the first (decode only); ttft_ms is prefill plus the first
    token. `echo` receives the text as it is produced.
    """
    tokenizer = Tokenizer(artifact)
    model = load_any(artifact, device=device)
    ids = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    if not ids:
        raise LiftcError("the prompt is empty; give at least one character of text")
    decoder, text, count, first = StreamDecoder(tokenizer), "", 0, 0.0
    started = time.perf_counter()
    for token in model.stream(
        ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        count += 1
        if count == 1:
            first = time.perf_counter() - started
        piece = decoder.push(token)
        text += piece
        if echo is not None and piece:
            print(piece, end="", flush=True, file=echo)
        if any(mark in text for mark in stop):
            break
    elapsed = time.perf_counter() - started
    rate = (count - 1) / (elapsed - first) if count > 1 and elapsed > first else 0.0
    answer = {
        "completion": text, "tokens": count, "prompt_tokens": len(ids), "ttft_ms": 1000 * first,
        "tokens_per_second": rate,
    }  # fmt: skip
    line = f"\n[{count} tokens, first after {1000 * first:.0f} ms, then {rate:.1f} tokens/s]"
    return {**answer, "text": line}
