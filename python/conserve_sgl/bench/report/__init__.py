"""The report: what a client's records say, results on disk, tables and pictures of them."""
