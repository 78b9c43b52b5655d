"""Files and Batches in a server's HTTP process. `lifespan.py` puts them into its application."""
