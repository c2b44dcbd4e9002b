"""Which experts tokens take, given what is on the device: one file a policy (`moesim.offload.ReroutingPolicy`)."""
