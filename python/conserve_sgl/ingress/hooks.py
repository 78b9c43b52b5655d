"""What the plugin hangs into SGLang's tokenizer process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from conserve_sgl.config import ConserveConfig
from conserve_sgl.ingress.arrival import ArrivalSender, arrival_endpoint
from conserve_sgl.ingress.classify import AskedJob
from conserve_sgl.ingress.in_hand import InHand, in_hand_file
from conserve_sgl.ingress.metric_names import WholeMetricNames
from conserve_sgl.ingress.middleware import ServiceClassMiddleware, asked_class, asked_job
from conserve_sgl.ingress.page import StatusPage
from conserve_sgl.ingress.sampler_limits import check_request, check_samples
from conserve_sgl.ingress.spare import SpareReceiver, SpareRoom, spare_endpoint
from conserve_sgl.policy.job_tag import JobTag
from conserve_sgl.policy.service_class import PriorityRule, ServiceClass

__all__ = ["Ingress", "refusal_counter"]


class Ingress:
    """The hooks of one tokenizer process and what they share.

    Args:
        config: the server's configuration.
        is_health_check: tells SGLang's own probe from a client's request.
    """

    def __init__(self, config: ConserveConfig, is_health_check: Callable[[Any], bool]) -> None:
        self._config = config
        self._is_health_check = is_health_check
        self._rule = PriorityRule()
        self._in_hand = InHand()
        self._sender: ArrivalSender | None = None
        self._room: SpareRoom | None = None
        self._count_refusal: Callable[[], None] = lambda: None

    def after_init_ipc_channels(self, _result: None, manager: Any, port_args: Any) -> None:
        """AFTER `TokenizerManager.init_ipc_channels`: our channels to and from the scheduler."""
        self._rule = PriorityRule.of(manager.server_args)
        self._sender = ArrivalSender(arrival_endpoint(port_args.instance_id))
        receiver = SpareReceiver(spare_endpoint(port_args.instance_id))
        self._room = SpareRoom(receiver, self._in_hand)
        if manager.server_args.tokenizer_worker_num > 1:
            self._in_hand.share(in_hand_file(port_args.instance_id))
        if manager.server_args.enable_metrics:
            self._count_refusal = refusal_counter(manager.served_model_name)

    def wrap(self, app: Any) -> None:
        """Put our layers around the whole application, which has not been started."""
        build_stack = app.build_middleware_stack
        offline = self._config.offline

        def build_with_ours() -> ServiceClassMiddleware:
            stack = WholeMetricNames(build_stack())
            return ServiceClassMiddleware(
                StatusPage(stack) if self._config.status.enabled else stack,
                max_offline=offline.queue_requests,
                retry_after_s=offline.retry_after_s,
                on_refusal=self._count_refusal,
                in_hand=self._in_hand,
                room=lambda: self._room,
                take_spare_only=offline.take == "spare",
            )

        app.build_middleware_stack = build_with_ours

    def before_init_req_state(self, manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
        """BEFORE `TokenizerManager._init_req_state`: stamp class and job, announce arrivals.

        The earliest point at which a request has its ids, and still before tokenization. Every
        route comes through here, `Engine.generate` too.
        """
        if isinstance(obj.rid, str) and self._is_health_check(obj):
            # Stamped too: under --enable-priority-scheduling no priority is the least urgent one.
            obj.priority = self._rule.stamp(None, ServiceClass.ONLINE)
            return
        service_class = asked_class.get() or self._rule.class_of(obj.priority)
        obj.priority = self._rule.stamp(obj.priority, service_class)
        if service_class is ServiceClass.OFFLINE:
            _stamp_job(obj, manager.preferred_sampling_params or {})
        elif self._sender is not None:
            self._sender.send(_rids_to_come(obj))

    @staticmethod
    def after_handle_parallel_sampling(_result: None, obj: Any) -> None:
        """AFTER `GenerateReqInput._handle_parallel_sampling`: before the samples are made."""
        check_samples(obj.batch_size, obj.parallel_sample_num)

    @staticmethod
    def around_create_tokenized_object(
        create: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """AROUND `TokenizerManager._create_tokenized_object`: refuse what ends the scheduler.

        Every prompt and sample of every route comes through here, with all its fields merged and
        normalized, and SGLang's own checks raise their ValueErrors here too.
        """
        try:
            request = create(manager, *args, **kwargs)
        except OverflowError as e:
            raise ValueError(f"a number of this request is out of range: {e}") from e
        check_request(request, manager.model_config.vocab_size)
        return request


def refusal_counter(model_name: str) -> Callable[[], None]:
    """Counts up `conserve:offline_http_refused_total`, which starts at zero, at every call.

    SGLang's own HTTP metrics lie behind our layer and do not see what it refuses.
    """
    # Not at the module's top: it must come after SGLang has set PROMETHEUS_MULTIPROC_DIR.
    from prometheus_client import Counter

    counter = Counter(
        "conserve:offline_http_refused_total",
        "Offline requests that the HTTP layer refused because enough were in hand.",
        ["model_name"],
    )
    return counter.labels(model_name=model_name).inc


def _stamp_job(obj: Any, preferred: Mapping[str, Any]) -> None:
    """Put the job's tag into the sampling parameters of `obj`, a list of them for several prompts.

    Args:
        obj: SGLang's request object; its parameters are replaced, never changed.
        preferred: the server's own sampling parameters, which SGLang merges by key.
    """
    asked, now_s = asked_job.get() or AskedJob(), time.monotonic()
    tag = JobTag(
        received_s=now_s,
        job=asked.job or "",
        deadline_s=None if asked.left_s is None else now_s + asked.left_s,
    )

    def tagged(params: Mapping[str, Any] | None) -> dict[str, Any]:
        params = params or {}
        custom = params.get("custom_params") or preferred.get("custom_params")
        return {**params, "custom_params": tag.put_into(custom)}

    params = obj.sampling_params
    obj.sampling_params = (
        [tagged(one) for one in params] if isinstance(params, list) else tagged(params)
    )


def _rids_to_come(obj: Any) -> tuple[str, ...]:
    """The ids under which `obj` will reach the scheduler."""
    if isinstance(obj.rid, str):
        return (obj.rid,)
    # With n > 1 each sample gets an id of its own and comes through the hook again; embeddings
    # have no samples.
    return tuple(obj.rid) if getattr(obj, "parallel_sample_num", 1) == 1 else ()
