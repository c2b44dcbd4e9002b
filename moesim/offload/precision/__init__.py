"""In how many bits experts are stored, which are merged, which are gone: one file a policy
(`moesim.offload.PrecisionPolicy`)."""
