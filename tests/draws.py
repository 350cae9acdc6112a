"""Random arrays."""

import jax.numpy as jnp
import numpy as np


def normal(seed, *shape, dtype=jnp.float32):
    # By NumPy: JAX would compile a program for each shape.
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(x.astype(dtype))
