"""What one operation costs: physics, measured residuals, and how firm the answer is."""
