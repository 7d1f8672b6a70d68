"""A GGUF file with weights of fewer bits, by llama.cpp itself. Runs in llama.cpp's environment:

python benchmarks/peers/llama_cpp_quantize.py GGUF Q8_0|Q4_0 OUT
"""

from __future__ import annotations

import sys

import llama_cpp


def main() -> None:
    source, kind, out = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), params)
    assert status == 0, f"llama_model_quantize gave {status}"


if __name__ == "__main__":
    main()
