"""What arrives and how it is routed: request streams and pools of routed tokens."""
