"""`moesim validate`: predictions written down first, then measured with real kernels, then judged."""
