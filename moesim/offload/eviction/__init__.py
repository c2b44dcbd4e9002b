"""Who leaves the cache: one file a policy (`moesim.offload.EvictionPolicy`)."""
