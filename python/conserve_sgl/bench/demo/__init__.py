"""The demo: `python -m conserve_sgl.bench.demo`."""
