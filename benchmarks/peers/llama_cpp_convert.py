"""bench-mini as a GGUF file, with llama.cpp's own converter. Runs in llama.cpp's environment:

    python benchmarks/peers/llama_cpp_convert.py SOURCE MODEL_DIR OUT

SOURCE is llama-cpp-python's unpacked source distribution.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    source, model_dir, out = (Path(argument) for argument in sys.argv[1:])
    llama = source / "vendor" / "llama.cpp"
    sys.path[:0] = [str(llama), str(llama / "gguf-py")]
    from conversion.base import TextModel

    # The converter knows tokenizers by a digest; ours is byte-level BPE as GPT-2's, and no text goes through it here.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # type: ignore[method-assign]
    sys.argv = ["convert_hf_to_gguf.py", str(model_dir), "--outtype", "bf16", "--outfile", str(out)]
    runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
