"""moesim: simulate Mixture-of-Experts deployments from recorded traffic, routing and measured hardware."""

__version__ = "0.1.0"
