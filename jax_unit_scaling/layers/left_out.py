"""What Flax has and neither family provides, and why."""

# A module, a base or a container: the same class serves.
_PLAIN = "it has no product and no parameters of its own: use Flax's"
_FP8 = (
    "it keeps a history of amax to scale by, which unit scaling makes unnecessary: "
    "pass `formats` to a layer"
)

# The name of each module of `flax.linen` or `flax.nnx`, and the reason.
LEFT_OUT: dict[str, str] = {
    "Module": _PLAIN,
    "Sequential": _PLAIN,
    "RNNCellBase": _PLAIN,
    "Dict": _PLAIN,
    "List": _PLAIN,
    "RoPE": "it has no parameters: `rotary_base` of attention, or `rotary`",
    "SelfAttention": (
        "Flax deprecates it: `MultiHeadDotProductAttention`, called with one input"
    ),
    "ConvLocal": (
        "its weights differ from place to place, so each learns from the batch alone: "
        "take patches (`jax.lax.conv_general_dilated_patches`), and a `DenseGeneral` "
        "with `batch_dims` over the places, moved to the front"
    ),
    "Fp8DotGeneral": _FP8,
    "Fp8DotGeneralOp": _FP8,
    "Fp8DirectDotGeneralOp": _FP8,
    "Fp8Einsum": _FP8,
    "NANOOFp8DotGeneralOp": _FP8,
}
