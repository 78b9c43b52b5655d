"""How this package talks to SGLang servers from outside: what jobs, `run-batch` and evals share.

`http.py` sends, `endpoints.py` says where to, `retry.py` whether and when again, `in_flight.py`
how much at a time. Nothing here knows what a job or a batch is.
"""
