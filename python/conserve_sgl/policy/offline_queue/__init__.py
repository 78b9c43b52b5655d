"""The offline backlog, beside SGLang's waiting queue and bounded: which request runs next.

item      what the queue knows of a request: job, deadline, tokens, prefix
prefix    the key by which prompts with a common prefix are next to each other
lane      the requests of one job and deadline: what gave way first, then by prefix
lanes     between them: the earliest deadline; without one, equal shares of tokens to each job
queue     `OfflineQueue`: the bound, and the account of what was taken
backlog   the queue at a moment, for metrics
eta       the queue by job, and when each will be done
"""

from conserve_sgl.policy.offline_queue.backlog import Backlog
from conserve_sgl.policy.offline_queue.item import OfflineItem
from conserve_sgl.policy.offline_queue.prefix import prefix_key
from conserve_sgl.policy.offline_queue.queue import OfflineQueue

__all__ = ["Backlog", "OfflineItem", "OfflineQueue", "prefix_key"]
