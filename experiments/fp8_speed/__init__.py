"""How fast 8-bit training is: beside bfloat16 and other libraries."""
