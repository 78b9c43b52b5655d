"""Devices: tables of measured steps, and what any step takes by them. No torch, no sglang.

The simulator runs schedulers over such a table, and the emulated device an engine.
"""
