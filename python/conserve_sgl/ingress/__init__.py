"""The tokenizer and HTTP process: the service class of a request, and the arrival channel."""
