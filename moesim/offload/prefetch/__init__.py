"""What is fetched before it is asked for: one file a policy (`moesim.offload.PrefetchPolicy`)."""
