"""An emulated device: SGLang and conserve as they are, over a forward pass that is only time.

queue     the device's clock: streams, events, computations and copies; pure
device    the device of this process: step times by a device file, `torch.cpu` by the queue
model     the model: tokens from the request and the position, seconds from the device
platform  EmulatedPlatform, which SGLang asks: the CPU platform but for the forward pass

SGLang finds `model` through `SGLANG_EXTERNAL_MODEL_PACKAGE`. Importing this package imports neither
torch nor sglang.
"""
