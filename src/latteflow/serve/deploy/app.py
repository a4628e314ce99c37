"""The application for Ray Serve, by the name that ``serve run`` and a cluster's configuration give it."""

# No `from __future__ import annotations`: Ray reads the type of build's argument, and has to find it, not its name.
import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from latteflow.errors import UserError
from latteflow.serve.api.keys import KEYS_VARIABLE, ApiKeys
from latteflow.serve.deploy.replica import Replica
from latteflow.serve.deploy.settings import ServeSettings

_RETRY_AFTER = 2.0
_CONSTRUCTIONS = 3
"""Tries to start a replica before a deployment counts as failed."""


def build(args: ServeSettings) -> Application:
    """Return the application, with as many replicas as the arguments say.

    In a configuration: ``import_path: latteflow.serve.deploy.app:build`` and ``args``, the fields of
    ``ServeSettings``. Keys are read here, from ``api_key_file`` and the variable LATTEFLOW_API_KEYS.

    Raises:
        UserError: there are no keys, and ``insecure`` does not say that this is meant: where Ray listens is not known
            here; or a number that cannot be.
    """
    keys = ApiKeys.read(args.api_key_file, os.environ.get(KEYS_VARIABLE))
    if not (keys or args.insecure):
        raise UserError(
            f"give api_key_file or {KEYS_VARIABLE}, or insecure: true if only this machine reaches Ray's proxies"
        )
    args.engine()
    replica = serve.deployment(**_options(args))(serve.ingress()(Replica))
    return replica.bind(args, keys)


def _options(args: ServeSettings) -> dict[str, Any]:
    """Return what Ray is told of the deployment."""
    needs = dict(args.per_replica)
    actor = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0), "resources": needs}
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_ongoing_requests": args.ongoing(),
        "max_queued_requests": args.max_queued or args.ongoing(),
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER),
        "graceful_shutdown_timeout_s": args.drain,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "max_constructor_retry_count": _CONSTRUCTIONS,
    }
    if args.autoscale is None:
        return {**options, "num_replicas": args.replicas}
    fewest, most = args.autoscale
    target = args.target_ongoing or args.max_batch
    return {
        **options,
        "autoscaling_config": AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=target),
    }
