"""Training steps: routing that evolves over steps, the time line of a step, what a rank keeps, the result."""
