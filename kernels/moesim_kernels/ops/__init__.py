"""Real operators: torch and Triton back ends, each with a plain reference. Needs torch, triton and numpy alone."""
