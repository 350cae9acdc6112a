"""What scale and depth do to a model: four small scripts, with a picture each."""
