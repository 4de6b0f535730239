"""The same operators in plain torch, under the same basenames: their definition, and their CPU kernels."""
