"""The 2023 paper's character-level experiments: `python -m experiments.char_lm.paper`.

Attention, convolution and recurrent highway models, regular and unit-scaled, in each
precision, at the best learning rate of each.

What is the paper's, as its authors' code has it: sizes, batch, overlap, schedule, the
places of norms, residual weights, initial weights of the regular models, geometric
means as constraints, one learning rate for all weights (vectors have that divided by
the root of their size), and plain attention in both parametrisations, without a factor
behind its softmax. What is not, as this library's modules have it: rotary positions in
place of relative ones; a factor for the ReLU and for what the highway cell writes; a
running mean that counts the embedding, so that the first branch does not replace it;
and no learnt vectors for the first character and the first carry.

Where tyro is missing: `run(PRESETS["gpu"][1])`.

Reference: Unit Scaling (Blake et al., 2023), section 6.1 and appendix B.
"""

from .presets import PRESETS as PRESETS
from .report import report as report
from .sweep import Config as Config, run as run
