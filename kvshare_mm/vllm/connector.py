"""The class that vLLM calls: forwards to the scheduler side or to the worker side, no more."""

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvshare_mm.vllm import compat
from kvshare_mm.vllm.build import build_runner, build_scheduler
from kvshare_mm.vllm.meta import Orders, WorkerReport
from kvshare_mm.vllm.options import ConnectorOptions
from kvshare_mm.vllm.scheduler_side import SchedulerSide
from kvshare_mm.vllm.stats import KVShareProm, KVShareStats, drained
from kvshare_mm.vllm.worker_side import WorkerSide

logger = logging.getLogger(__name__)


class KVShareConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """KVShare inside vLLM: once in the scheduler's process, once in each worker's."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._options = ConnectorOptions.of(extra)
        self._caches_of = kv_cache_config
        self._scheduler: SchedulerSide | None = None
        self._runner: WorkerSide | None = None
        self._obstacle: str | None = compat.unsupported()
        self._requests: dict[str, Any] = {}
        if role is KVConnectorRole.SCHEDULER and self._obstacle is None:
            self._scheduler = build_scheduler(vllm_config, kv_cache_config, self._options)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what is stored."""
        return False

    # -- scheduler side ---------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._requests[request.request_id] = request
            self._scheduler.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            block_ids = list(blocks.get_block_ids()[0])
            self._scheduler.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        if self._scheduler is None:
            return Orders()
        return self._scheduler.orders(
            scheduler_output.num_scheduled_tokens,
            self._requests.__getitem__,
            lambda request_id: list(self._kv_cache_manager.get_block_ids(request_id)[0]),
        )

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None and self._scheduler.audits is not None:
            self._scheduler.audits.pool = gpu_block_pool

    def has_pending_block_frees(self) -> bool:
        """Somebody needs blocks."""
        audits = None if self._scheduler is None else self._scheduler.audits
        return audits is not None and audits.make_room()

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is None:
            return
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._scheduler.reported(report, self._requests.get)
        for request_id in connector_output.finished_recving or ():
            self._scheduler.loaded(request_id)
        if self._scheduler.audits is not None:
            self._scheduler.audits.given_back(connector_output.finished_sending or ())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        if self._scheduler is None:
            return False, None
        hold, summary = self._scheduler.finished(request, block_ids)
        return hold, summary or None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, list(block_ids[0]) if block_ids else [])

    # -- worker side ------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._obstacle is not None:
            return
        try:
            self._runner = build_runner(
                self._vllm_config, self._caches_of, kv_caches, self._options
            )
        except Exception as error:
            # The scheduler side learns of it with the first report; vLLM serves on.
            logger.exception("KVShare is off")
            self._obstacle = str(error) or type(error).__name__

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads run behind the forward, in `wait_for_save`: a block may be scheduled to be written
        in the very step whose cache hits name it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Requests are saved whole, when they are over."""

    def wait_for_save(self) -> None:
        if self._runner is not None and self.has_connector_metadata():
            self._runner.step(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._runner is None:
            # Orders given before the obstacle was known.
            orders = self._get_connector_metadata() if self.has_connector_metadata() else Orders()
            loads = {load.request_id for load in orders.loads}
            return KVConnectorTransferResults({s.request_id for s in orders.saves}, loads, loads)
        sent, received, failed = self._runner.finished()
        return KVConnectorTransferResults(sent, received, failed)

    def build_connector_worker_meta(self) -> WorkerReport | None:
        if self._runner is not None:
            return self._runner.report()
        return WorkerReport(obstacle=self._obstacle) if self._obstacle is not None else None

    # -- both -------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVShareStats | None:
        side = self._scheduler or self._runner
        return None if side is None else drained(side.counters, side.times)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVShareStats:
        return KVShareStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVShareProm:
        return KVShareProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._runner):
            if side is not None:
                side.close()
