"""What stays on the device with a proof: one file a policy (`moesim.offload.OffloadPolicy`)."""
