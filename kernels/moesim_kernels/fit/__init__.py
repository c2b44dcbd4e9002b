"""From timed points to an operator model: physics, residual curves, conformal intervals."""
