"""Every metric that the engine reports, by name: plain data, so that both sides of the wire can read it.

A Stats message names a series as `name` or `name{key="value"}`; a name that is not here is still exposed, without help.
"""

from __future__ import annotations

ENGINE_COUNTERS: dict[str, str] = {
    "coserve_step_tokens_total": "Tokens that iterations ran, by kind (decode, prefill, train_forward, head, …)",
    "coserve_iterations_total": "Iterations of the engine",
    "coserve_iterations_with_streams_total": "Iterations with a running stream",
    "coserve_iterations_in_slo_total": "Iterations with a running stream that kept the inter-token budget",
    "coserve_busy_seconds_total": "Seconds spent inside iterations",
    "coserve_plans_ahead_total": "Plans made while the iteration before them ran, by whether they could be used",
    "coserve_sweep_moves_total": "Sweeps that got their blocks (place), gave some back (lean) or left (park)",
    "coserve_preemptions_total": "Requests that gave their K/V back and were computed again",
    "coserve_recomputed_tokens_total": "Tokens computed again after a preemption",
}

ENGINE_GAUGES: dict[str, str] = {
    "coserve_requests_running": "Sequences that hold K/V blocks",
    "coserve_requests_waiting": "Sequences that wait in the engine",
    "coserve_kv_blocks_total": "K/V blocks there are",
    "coserve_kv_blocks_free": "K/V blocks that a request can have, those of cached prefixes and idle adapters included",
    "coserve_prefix_cache_blocks": "K/V blocks kept for their content",
    "coserve_adapter_pool_bytes_total": "The most bytes that adapters may hold",
    "coserve_adapter_pool_bytes_used": "Bytes that resident adapters hold, whole blocks",
    "coserve_adapters_resident": "Adapters in the pool",
    "coserve_jobs_running": "Finetuning jobs in the engine",
    "coserve_training_sweeps": "Packed streams of training sequences under way",
    "coserve_device_bytes": "Bytes of the device by who holds them (weights, kv_cache, adapter_pool, activations, …)",
    "coserve_adapter_cache_bytes": "Bytes of parsed adapters kept in the host's memory",
    "coserve_allocator_bytes": "Bytes that CUDA's allocator has given out, and those that it has taken, by kind",
    "coserve_prediction_error_median": "Median of |measured / predicted - 1| of the last 1,000 iterations",
    "coserve_prediction_over_share": "Share of these that took longer than their upper estimate",
    "coserve_prediction_far_over_share": "Share of these that took longer than it by more than 20%",
    "coserve_slo_itl_seconds": "The promise between two tokens",
    "coserve_slo_ttft_seconds": "The promise for the first token",
}

# Upper bounds in seconds; a CPU's tokens take tens of milliseconds to seconds, a GPU's a few milliseconds.
ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
