"""A mini-runtime: a real MoE model with its experts in slow memory, a real cache and real transfers, driven by the
objects that the simulator uses (`moesim.offload`)."""
