"""Scenarios: strict YAML in, frozen typed values out. The only reader of YAML."""
