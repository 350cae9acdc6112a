"""Character-level language modelling, regular against unit-scaled."""
