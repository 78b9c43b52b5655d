"""The offline backlog, beside SGLang's waiting queue and bounded: which request runs next."""

from conserve_sgl.policy.offline_queue.queue import Backlog, OfflineItem, OfflineQueue, prefix_key

__all__ = ["Backlog", "OfflineItem", "OfflineQueue", "prefix_key"]
