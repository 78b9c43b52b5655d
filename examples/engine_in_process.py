"""`sglang.Engine` in this process with both classes: a negative priority makes a request offline.

    CONSERVE_CONFIG=configs/serve/default.yaml python examples/engine_in_process.py MODEL

There is no HTTP server here, so prefix, headers and `service_tier` do not exist: only `priority`.
"""

import asyncio
import sys

import sglang as sgl

OFFLINE = -1


async def main(model: str) -> None:
    engine = sgl.Engine(model_path=model, dtype="float32", max_total_tokens=4096)
    try:
        params = {"temperature": 0, "max_new_tokens": 8}
        documents = [f"Document {i} is about" for i in range(8)]
        batch = asyncio.gather(
            *(engine.async_generate(text, params, priority=OFFLINE) for text in documents)
        )
        answer = await engine.async_generate("Hello, my name is", params)  # online: goes first
        print("online: ", answer["text"])
        for document, done in zip(documents, await batch, strict=True):
            print("offline:", document, "->", done["text"])
        (state,) = await engine.tokenizer_manager.get_internal_state()
        print("offline requests accepted:", state["conserve"]["offline_accepted"])
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine's processes import this file too
    asyncio.run(main(sys.argv[1]))
