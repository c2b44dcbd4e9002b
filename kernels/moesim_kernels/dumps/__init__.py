"""Recordings that engines write with torch, as plain arrays: `python -m moesim_kernels.dumps SRC.pt --into DIR`.

moesim reads no `.pt` itself. It runs this module in a process of its own, whose memory and time are limited before the
file is opened, and reads the arrays that come out. Needs torch and numpy alone, so the same command serves on the
machine that made the recording.
"""
