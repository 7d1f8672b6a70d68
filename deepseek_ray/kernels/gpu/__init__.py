"""Operators in Triton for CUDA devices. `TRITON_INTERPRET=1`, set before they are imported, runs them on the CPU: slow,
and how they are tested without a GPU."""
