"""lattice: learn, evaluate, show and report mapping matrices."""
