"""One client, both classes: `service_tier="flex"` is all that makes a request offline."""

import os
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:30000")
client = OpenAI(
    base_url=f"{URL}/v1",
    api_key="none",
    timeout=24 * 3600,  # offline work waits as long as online work wants
    max_retries=100,  # a server with enough offline work in hand answers 429 and Retry-After
)


def summarise(text: str) -> str:
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"Summarise in one sentence: {text}"}],
        max_tokens=32,
        service_tier="flex",
    )
    return answer.choices[0].message.content


texts = [f"Report {i}: all went well, but for number {i}." for i in range(4)]
with ThreadPoolExecutor(16) as pool:
    for text, summary in zip(texts, pool.map(summarise, texts), strict=True):
        print(f"{text} -> {summary!r}")
