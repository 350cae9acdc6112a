"""The depth of a residual stack, written on its parameters."""

from typing import TypeVar

from flax import nnx

from ..arguments import positive_integer

M = TypeVar("M", bound=nnx.Module)


def set_depth(module: M, depth: int) -> M:
    """Writes `depth` on the parameters of a residual branch, and returns the module.

    Args:
        module: all that is inside the branch, after it is built; whatever depth its
            parameters had is replaced.
        depth: the residual adds of the whole stack: two for each Transformer block.

    u-muP's rules then give each of its parameters depth^-1/2 of the learning rate, so
    that the sum of all branches' updates has the same scale at every depth.

    Reference: u-muP (Blake et al., 2024), table 2.
    """
    depth = positive_integer("depth", depth)
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            node.set_metadata(depth=depth)
    return module
