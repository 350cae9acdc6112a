"""An unmodified Flax model in low precision, by transformations of its loss alone."""
