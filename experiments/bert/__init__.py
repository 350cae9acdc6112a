"""BERT in every precision: `python -m experiments.bert large`.

`experiments.bert.pretrain` has the paper's pre-training at its shapes,
`experiments.bert.finetune` SQuAD, and this package their comparison over precisions:
the same data, the same masks and the same optimiser, regular and unit-scaled.

What is the paper's: shapes, LAMB and its schedule, two phases, no loss scale for
unit-scaled models. What is not: no next-sentence prediction (a sequence is still a pair
of segments), no dropout, and products are rounded to FP8 but for the readout, which
shares its table with the embedding. Both parametrisations have plain attention, without
a factor behind the softmax; unit-scaled branches are weighted by the running mean.
"float16" keeps float32 master weights here.

Where tyro is missing: `run(PRESETS["large"][1])`.

Reference: Unit Scaling (Blake et al., 2023), section 6.2 and table 2.
"""

from .compare import PRESETS as PRESETS, Config as Config, run as run
