"""Compile a model folder to a fractional bit-width and generate from the result.

    python examples/01_compile_and_generate.py MODEL OUT [BITS]

MODEL is a Hugging Face folder with safetensors, or a .gguf file; OUT must not exist yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import liftc


def main(model: Path, out: Path, bits: float = 2.4) -> str:
    """Compile, load, and return the text that follows a prompt."""
    liftc.compile(model, out, bits=bits, calibration_windows=16, calibration_length=32, beam=8)
    loaded = liftc.load(out)  # torch and tvm_ffi only: no TVM, no transformers
    tokenizer = liftc.Tokenizer(out)
    ids = loaded.generate(tokenizer.encode("It was the best of"), max_new_tokens=16)
    return tokenizer.decode(ids[0].tolist())


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:])))
