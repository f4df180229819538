"""Measurement: the timer, FLOPs and peak memory, and the rows, tables and plots of results."""
