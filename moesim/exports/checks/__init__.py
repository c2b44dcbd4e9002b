"""The rules that engines hold placement files to, as code.

Each module is written from the engine's source that it names, knows nothing of the writers, and lists what is wrong
instead of stopping at the first.
"""
