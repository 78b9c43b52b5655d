"""Online requests and offline work on one SGLang engine, online latency kept.

A plugin for SGLang 0.5.23 (ConServe, arXiv 2410.01228v2). Importing this package imports neither
torch nor sglang; see docs/structure.md for what each subpackage is.
"""

from conserve_sgl.errors import ConserveError

__all__ = ["ConserveError", "__version__"]

__version__ = "0.1.0"
