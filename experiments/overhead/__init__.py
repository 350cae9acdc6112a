"""What unit scaling costs: import, compilation and steps, beside plain Flax."""
