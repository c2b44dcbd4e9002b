"""Which tokens run together: one file a policy (`moesim.offload.RebatchingPolicy`)."""
