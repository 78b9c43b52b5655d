"""Measures co-serving: arrivals, open-loop load, the field's metrics, servers, reports.

Nothing here imports torch or SGLang; servers and jobs are other processes.
"""
