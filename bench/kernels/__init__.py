"""One benchmark per kernel, by the kernel's basename; run one with `pytest bench/kernels/bench_<name>.py`."""

# why a benchmark of Triton's kernels is skipped
NO_GPU = "Triton must have a GPU to run its kernels, got none. Run this on a machine with one."
