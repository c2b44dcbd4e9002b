"""From a deployment to a plan, and from its measured points to a hardware profile."""
