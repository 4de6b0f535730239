"""The names of the USDRL reference code: change one import line, keep the code.

`fastskel.compat.usdrl.dste` stands for the reference's `model.DSTE`, `.sttr` for `model.STTR`, `.loss` for `model.loss`.
"""
