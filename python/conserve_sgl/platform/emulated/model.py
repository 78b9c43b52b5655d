"""The model of an emulated device: no weights, tokens by arithmetic, and the device's time.

A token's KV slot holds a checksum of the prompt and all tokens up to it. The next token follows
from it, so that it depends on the request and the position alone, and comes out right only if the
slot before it is what the engine takes it for: computed, found in the radix tree, or loaded back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform.emulated.device import the_device
from conserve_sgl.platform.emulated.tokens import checksums, next_tokens
from conserve_sgl.policy.latency import StepWork

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

__all__ = ["EmulatedForCausalLM", "EntryClass", "NoAttention", "work_of"]

_SAMPLED_TOKENS = 64
"""Of a row's context every so many-th slot is looked at: prefixes are shared in long pieces."""


def work_of(forward_batch: ForwardBatch) -> StepWork:
    """What one forward of `forward_batch` computes on the real device."""
    mode = forward_batch.forward_mode
    if not mode.is_extend():
        return StepWork.of(decode_contexts=forward_batch.seq_lens_cpu.tolist())
    new = forward_batch.extend_seq_lens_cpu
    spans = list(zip(new, forward_batch.extend_prefix_lens_cpu, strict=True))
    rows = 0
    if mode.is_mixed():  # decode rows that ride along are the last, each a prompt of one token
        while rows < len(new) and new[-1 - rows] == 1:
            rows += 1
    prompts, riding = spans[: len(spans) - rows], spans[len(spans) - rows :]
    return StepWork.of(prompts, (resident + new for new, resident in riding))


class EmulatedForCausalLM(torch.nn.Module):
    """Stands for any decoder; SGLang's interface of a model that can be run in layer slices.

    Args:
        config: of the model it stands for, made small by `EmulatedPlatform`.

    Raises:
        IncompatibleError: the device was measured with a model of another depth.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:  # noqa: ARG002
        super().__init__()
        self._device = the_device()
        self._layers = config.num_hidden_layers
        if self._layers != self._device.spec.layers:
            raise IncompatibleError(
                f"{self._device.name} has the step times of a model of {self._device.spec.layers} "
                f"layers, and this one has {self._layers}"
            )
        self._work = StepWork()
        ends = config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        self._spoken = torch.tensor([t for t in range(config.vocab_size) if t not in ends])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """There are none."""

    def prepare_for_forward(self, forward_batch: ForwardBatch) -> None:
        """SGLang calls it before each forward, while a mixed batch still says that it is one."""
        self._work = work_of(forward_batch)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        **_kwargs: Any,
    ) -> LogitsProcessorOutput:
        """Launch a whole step. The "logits" are the next tokens, [requests, 1]."""
        repeated = _repeated_context(forward_batch, self._work.decode_rows)
        self._device.run_step(self._work, _wait_for_load, repeated_context=repeated)
        return self._output(input_ids, positions, forward_batch)

    def forward_split_prefill(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        split_interval: tuple[int, int],
        input_embeds: torch.Tensor | None = None,  # noqa: ARG002
    ) -> LogitsProcessorOutput | None:
        """Launch the layers of `split_interval`; the output comes with the last."""
        self._device.run_slice(self._work, range(*split_interval), _wait_for_load)
        if split_interval[1] < self._layers:
            return None
        return self._output(input_ids, positions, forward_batch)

    def _output(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """Write the checksums of the step's tokens, and tell what follows the last of each."""
        if forward_batch.forward_mode.is_decode_or_idle():
            lengths = torch.ones_like(positions)
        else:
            lengths = forward_batch.extend_seq_lens.long()
        last = torch.cumsum(lengths, 0) - 1
        slots = self._slots()
        before = _before(slots, forward_batch.req_pool_indices, positions[last - lengths + 1])
        sums = checksums(input_ids, positions, lengths, before)
        slots[forward_batch.out_cache_loc.long()] = sums
        tokens = next_tokens(sums[last], self._spoken)
        return LogitsProcessorOutput(next_token_logits=tokens.unsqueeze(1))

    def _slots(self) -> torch.Tensor:
        """The last layer's keys, which a load brings last, as one int64 a token: a view."""
        keys = get_token_to_kv_pool().get_key_buffer(self._layers - 1)
        return keys.view(len(keys), -1).view(torch.int64)[:, 0]


EntryClass = EmulatedForCausalLM


class NoAttention(AttentionBackend):
    """The model reads its KV itself, from the pools that SGLang looks for here."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """There is nothing to plan."""


def _wait_for_load(layer: int) -> None:
    """The stream waits for what is being loaded into a layer's KV from the host."""
    get_token_to_kv_pool().get_key_buffer(layer)


def _repeated_context(forward_batch: ForwardBatch, rows: int) -> int:
    """About how many tokens of KV the last `rows` of a batch, which decode, read again that another
    of them has read: those of a prefix that they share."""
    if rows < 2:
        return 0
    lengths = forward_batch.seq_lens_cpu[-rows:]
    at = torch.arange(0, int(lengths.max()), _SAMPLED_TOKENS)
    req_to_token = get_req_to_token_pool().req_to_token
    slots = req_to_token[forward_batch.req_pool_indices[-rows:].unsqueeze(1), at]
    read = slots[at < lengths.unsqueeze(1)]
    return (len(read) - len(read.unique())) * _SAMPLED_TOKENS


def _before(slots: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The checksum that each row's KV holds before its position `starts`; 0 before the first."""
    req_to_token = get_req_to_token_pool().req_to_token
    found = slots[req_to_token[rows, (starts - 1).clamp(min=0)].long()]
    return torch.where(starts > 0, found, 0)
