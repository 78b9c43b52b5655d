"""What a tokenizer worker of SGLang's imports and serves: see `plugin.py`."""

from conserve_sgl.plugin import worker_app

__all__ = ["app"]

app = worker_app()
