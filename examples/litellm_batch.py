"""LiteLLM as the client: a flex request, and a batch through its files and batches functions.

`pip install litellm`; run with 1.108.7, once, against a server without an engine (docs/fleet.md).
It is not in this repository's environment: 580 MB with its proxy.
"""

import json
import os
import time

import litellm

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:30000")
# `openai`: an endpoint that speaks OpenAI's API, and the provider that passes files and batches on.
SERVER = {"api_base": f"{URL}/v1", "api_key": "none"}

answer = litellm.completion(
    model="openai/default",
    messages=[{"role": "user", "content": "What is the capital of Chile?"}],
    max_tokens=16,
    service_tier="flex",  # offline
    timeout=24 * 3600,  # as long as online work wants
    num_retries=100,  # 429 and Retry-After: enough offline work in hand
    **SERVER,
)
print("chile", answer.choices[0].message.content)

questions = {"portugal": "What is the capital of Portugal?", "peru": "And of Peru?"}
lines = [
    {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "default",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 16,
        },
    }
    for name, question in questions.items()
]
data = "".join(json.dumps(line) + "\n" for line in lines).encode()
uploaded = litellm.create_file(
    file=("questions.jsonl", data), purpose="batch", custom_llm_provider="openai", **SERVER
)
batch = litellm.create_batch(
    input_file_id=uploaded.id,
    endpoint="/v1/chat/completions",
    completion_window="24h",
    custom_llm_provider="openai",
    **SERVER,
)
while batch.status in ("validating", "in_progress", "finalizing"):
    time.sleep(1)
    batch = litellm.retrieve_batch(batch_id=batch.id, custom_llm_provider="openai", **SERVER)
print(batch.status, batch.request_counts)

# Lines come in the order in which they were finished: join on custom_id.
for file_id in (batch.output_file_id, batch.error_file_id):
    if file_id is not None:
        content = litellm.file_content(file_id=file_id, custom_llm_provider="openai", **SERVER)
        for line in content.text.splitlines():
            result = json.loads(line)
            reply = result["response"] or {"body": result["error"]}
            print(result["custom_id"], json.dumps(reply["body"])[:200])
