"""FP8 out of the box: a GPT as it is, and unit-scaled by one call.

The authors' demonstration on nanoGPT: its loss stalls where products are in FP8, and
follows float32's where the model is unit-scaled as well.

Reference: the notebook "Out-of-the-box FP8 training" of the 2023 paper's authors.
"""
