"""Ray Data: a dataset through the server as offline work, with `ray.data.llm`'s HTTP processor.

`pip install 'ray[data,default]'`; run with 2.60.0, once, against a server without an engine
(docs/fleet.md). It is not in this repository's environment: 570 MB.
"""

import os

import aiohttp
import ray
from ray.data.llm import HttpRequestProcessorConfig, build_processor

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:30000")


def session() -> aiohttp.ClientSession:
    # aiohttp's own limit is 5 minutes; offline work waits for as long as online work wants.
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))


config = HttpRequestProcessorConfig(
    url=f"{URL}/v1/chat/completions",
    session_factory=session,
    # A worker has one request in flight, whatever the size of its batches: eight workers, eight
    # requests. A plain 8 would begin with one worker.
    concurrency=(8, 8),
    batch_size=4,
    # A worker waits for the server; by default Ray would keep a CPU free for each.
    http_request_stage={"num_cpus": 0.1},
    # Ray passes over Retry-After and doubles its wait at each 429, so these are 17 minutes. A row
    # that is refused for longer ends the job: `conserve run-batch` waits without a limit.
    max_retries=10,
    base_retry_wait_time_in_s=1,
)
process = build_processor(
    config,
    preprocess=lambda row: {
        "payload": {
            "model": "default",
            "messages": [{"role": "user", "content": row["question"]}],
            "max_tokens": 16,
            "service_tier": "flex",  # offline
        }
    },
    # An answer of status 400 or 500 comes here as well, without `choices`.
    postprocess=lambda row: {
        "question": row["question"],
        "answer": row["http_response"]["choices"][0]["message"]["content"],
    },
)

countries = ["Portugal", "Peru", "Chile", "Kenya", "Nepal", "Malta", "Ghana", "Qatar"]
questions = ray.data.from_items([{"question": f"What is the capital of {c}?"} for c in countries])
for row in process(questions).take_all():
    print(row["question"], "->", repr(row["answer"]))
