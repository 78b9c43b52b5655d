"""The systems: their servers, what the servers say of themselves, and the run of a benchmark."""
