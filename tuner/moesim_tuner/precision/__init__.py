"""Bit widths with a proof: one file a policy (`moesim.offload.PrecisionPolicy`)."""
