"""OpenAI Files and Batches: offline work as people submit it.

In a server (`server/`), routes take files and batches in, a SQLite store and plain files keep
them, and a processor sends their lines through the server's own routes as offline requests. The
command `conserve run-batch` (`run_batch.py`) does the same from outside, with one file in and one
out. Beside them is what both need: the shapes, the input file, the result files, the answers.
"""
