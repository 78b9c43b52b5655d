"""KV checkpoints: offline requests give way without losing what they computed.

Importing its modules imports torch and SGLang.
"""
