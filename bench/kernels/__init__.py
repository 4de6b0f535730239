"""One benchmark per kernel, by the kernel's basename; run one with `pytest bench/kernels/bench_<name>.py`."""
