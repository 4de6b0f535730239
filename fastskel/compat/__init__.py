"""Other systems' own class signatures and checkpoint keys, over fastskel's modules."""
