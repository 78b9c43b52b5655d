"""`conserve simulate`: SGLang's and conserve's schedulers on a fake clock. No torch, no sglang."""
