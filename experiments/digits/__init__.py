"""Handwritten digits: a residual network of convolutions, regular and unit-scaled."""
