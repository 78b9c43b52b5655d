"""An SGLang program as offline work: the base URL ends in /offline, the program stays as it was."""

import os

import sglang as sgl

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:30000")


@sgl.function
def review(s, product):
    s += f"A customer bought {product} and wrote:\n"
    s += sgl.gen("text", max_tokens=16, temperature=0, stop="\n")
    s += "\nOn the whole the customer is "
    s += sgl.select("verdict", choices=["happy", "unhappy"])


sgl.set_default_backend(sgl.RuntimeEndpoint(f"{URL}/offline"))
products = ["a teapot", "a bicycle", "a map"]
states = review.run_batch([{"product": product} for product in products], num_threads=16)
for product, state in zip(products, states, strict=True):
    if state.error() is not None:  # a program's errors are kept in its state, and not raised
        raise state.error()
    print(f"{product}: {state['verdict']} ({state['text']!r})")
