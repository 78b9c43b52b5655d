"""Files and Batches in the HTTP process of a server; `batch_server.py` puts them there."""
