"""lm-evaluation-harness tasks as offline work. The package `lm_eval` is imported when needed."""

from __future__ import annotations
