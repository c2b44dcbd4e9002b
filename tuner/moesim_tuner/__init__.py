"""Search and solvers: placements with proven bounds (OR-Tools)."""
