"""OpenAI Files and Batches: offline work as people submit it.

On the server (`server.py`), routes take files and batches in, a SQLite store and plain files keep
them, and a runner sends their lines through the server's own routes as offline requests. The
command `conserve run-batch` (`client.py`) does the same from outside, with one file in and one out.
"""
