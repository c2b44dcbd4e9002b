"""The event loop: SimPy processes for arrivals, groups of ranks that step together, and links."""
