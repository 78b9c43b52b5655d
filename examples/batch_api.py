"""A batch with the `openai` client: upload a file, wait, and read BOTH result files."""

import io
import json
import os
import time

from openai import OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:30000")
client = OpenAI(base_url=f"{URL}/v1", api_key="none")

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
data = io.BytesIO("".join(json.dumps(line) + "\n" for line in lines).encode())
uploaded = client.files.create(file=("questions.jsonl", data), purpose="batch")
batch = client.batches.create(
    input_file_id=uploaded.id,
    endpoint="/v1/chat/completions",
    completion_window="24h",
    metadata={"who": "examples/batch_api.py"},
)
while batch.status in ("validating", "in_progress", "finalizing"):
    time.sleep(1)
    batch = client.batches.retrieve(batch.id)
print(batch.status, batch.request_counts)

# Lines come in the order in which they were finished: join on custom_id.
for file_id in (batch.output_file_id, batch.error_file_id):
    if file_id is not None:
        for line in client.files.content(file_id).text.splitlines():
            result = json.loads(line)
            reply = result["response"] or {"body": result["error"]}
            print(result["custom_id"], json.dumps(reply["body"])[:200])
