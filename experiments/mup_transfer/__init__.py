"""Learning rates that transfer over width: the sweep, and muP's coordinate check."""
