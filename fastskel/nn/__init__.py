"""Building blocks of encoders and objectives, each on plain tensors."""
