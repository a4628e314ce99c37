"""Everything a deployment is told, by the command line or by a cluster's YAML, as plain values that can travel."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from latteflow.serve.api.keys import ApiKeys
from latteflow.serve.api.settings import ServerSettings
from latteflow.serve.engine.settings import EngineSettings, Placement
from latteflow.serve.loading import asked_weights, fastest_dtype

_SPARE = 16
"""Requests a replica is sent beside those its engine may hold: to say that it is full, and how it is."""
_ENGINE = EngineSettings()


class ServeSettings(BaseModel):
    """A served model: what is loaded, its bounds, who may ask, and how many replicas share the work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "emoji-64"
    """An embedded model, a hub id, or a folder that every machine finds under the same path."""
    device: str | None = None
    """Left out, CUDA where a replica has it, else the CPU."""
    dtype: str | None = None
    quantize: str | None = None
    compiled: bool = False
    threads: PositiveInt | None = None
    """Of the CPU, for one forward; left out, one for embedded models, else as many as torch takes."""

    max_batch: int = _ENGINE.max_batch
    max_active: int = _ENGINE.max_active
    queue: int = _ENGINE.max_queued_pictures
    """Work that may wait in one engine, in pictures of the model's own size and 40 guided steps."""
    placement: Placement = _ENGINE.placement
    """Where an engine's steps are made (``EngineSettings``)."""
    stage_devices: tuple[str, ...] = ()
    """Of a group pipeline's stages."""

    api_key_file: Path | None = None
    """Keys, one a line; read where the application is built. They travel to replicas as digests."""
    insecure: bool = False
    """Whether requests are taken without a key."""
    allow_host: tuple[str, ...] = ()
    allow_image_domain: tuple[str, ...] = ()
    log_prompts: bool = False

    replicas: PositiveInt = 1
    autoscale: tuple[PositiveInt, PositiveInt] | None = None
    """Fewest and most replicas, in place of a fixed number."""
    target_ongoing: PositiveFloat | None = None
    """Requests a replica should have under way, for autoscaling; left out, as many as share a forward."""
    per_replica: dict[str, PositiveFloat] = {"CPU": 1}
    """What a replica takes of Ray's resources, such as ``{"CPU": 4, "GPU": 1}``."""
    per_stage: dict[str, PositiveFloat] | None = None
    """What a stage of a replica's group pipeline takes, as an actor of its own, on any machine; left out, stages are
    processes beside the replica, and part of what it takes."""
    max_ongoing: PositiveInt | None = None
    """Requests that Ray sends to a replica at a time; left out, some more than its engine holds, so that it is the
    engine which says that it is full, in OpenAI's words."""
    max_queued: PositiveInt | None = None
    """Requests that wait in each of Ray's proxies for a replica, those that just come in counted too; more are answered
    429. Left out, as many as a replica is sent."""
    drain: float = Field(default=30.0, ge=0)
    """Seconds for what runs to finish when a replica is stopped."""

    @model_validator(mode="after")
    def _consistent(self) -> ServeSettings:
        if self.autoscale is not None and self.autoscale[0] > self.autoscale[1]:
            raise ValueError(f"autoscale goes from the fewest to the most replicas: got {self.autoscale}")
        if self.per_stage is not None and self.placement == "local":
            raise ValueError("per_stage is for a group pipeline: set placement to pipeline or auto")
        return self

    @property
    def most_replicas(self) -> int:
        """How many replicas there may be."""
        return self.replicas if self.autoscale is None else self.autoscale[1]

    def with_fastest_dtype(self) -> ServeSettings:
        """Return the settings with a dtype, where none was asked for and another than the model's own is faster."""
        if self.dtype is not None or self.quantize is not None:
            return self
        return self.model_copy(update={"dtype": fastest_dtype(self.model, self.device)})

    def engine(self) -> EngineSettings:
        """Return the engine's part.

        Raises:
            UserError: a number that cannot be.
        """
        return EngineSettings(
            max_batch=self.max_batch,
            max_active=self.max_active,
            max_queued_pictures=self.queue,
            placement=self.placement,
            devices=self.stage_devices,
        )

    def api(self, keys: ApiKeys) -> ServerSettings:
        """Return the API's part."""
        return ServerSettings(
            model=Path(self.model).resolve().name if Path(self.model).exists() else self.model,
            weights=asked_weights(self.dtype, self.quantize),
            keys=keys,
            hosts=frozenset(self.allow_host),
            image_domains=frozenset(domain.lower() for domain in self.allow_image_domain),
            log_prompts=self.log_prompts,
        )

    def ongoing(self) -> int:
        """Return how many requests a replica is sent at a time."""
        if self.max_ongoing is not None:
            return self.max_ongoing
        engine = self.engine()
        pictures = engine.max_active + engine.max_queued_pictures
        return pictures + engine.max_chats + engine.max_queued_chats + _SPARE
