"""The verbs `calibrate` and `profile`, found by moesim's command line through the entry-point group moesim.commands."""
