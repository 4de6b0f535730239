"""Fused operators, one file each; importing one registers its operator `fastskel::<name>`, with or without a GPU."""
