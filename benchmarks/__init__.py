"""asv benchmarks (`make bench`), and scripts beside them that print tables (`speed.py`)."""
