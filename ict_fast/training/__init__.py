"""The trainer: one step, the loop around it, and what it leaves behind.

Nothing is imported here, so that `ict_fast.training.step` needs torch alone (benchmarks on bare machines).
"""
