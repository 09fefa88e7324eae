"""What a request for a fine-tuning job holds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]
# Strict: `true` is no 1, and "3" no 3.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1, le=10**6)]
Factor = Annotated[Number, Field(gt=0, le=1e6)]
METHODS = ("supervised", "dpo", "reinforcement")
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


class Asked(BaseModel):
    """Base of requests; an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Asked):
    """What all methods have; ``auto`` leaves the choice to the server."""

    batch_size: Count | Auto = "auto"
    learning_rate_multiplier: Factor | Auto = "auto"
    n_epochs: Annotated[Whole, Field(ge=1, le=50)] | Auto = "auto"


class DpoHyperparameters(Hyperparameters):
    """Of the method ``dpo``."""

    beta: Annotated[Number, Field(gt=0, le=2)] | Auto = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    """Of the method ``reinforcement``."""

    compute_multiplier: Annotated[Number, Field(gt=0, le=10)] | Auto = "auto"
    eval_interval: Count | Auto = "auto"
    eval_samples: Annotated[Whole, Field(ge=1, le=64)] | Auto = "auto"
    reasoning_effort: Literal["default"] = "default"


class Supervised(Asked):
    """The method ``supervised``."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Asked):
    """The method ``dpo``."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(Asked):
    """The method ``reinforcement``."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Asked):
    """How a model is trained, with the settings of that way."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Method":
        others = [name for name in METHODS if name != self.type and getattr(self, name)]
        if others:
            raise ValueError(f"type is {self.type}, but settings of {others[0]} are given")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("reinforcement needs its grader")
        return self


class Wandb(Asked):
    """The run's place in Weights & Biases."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    tags: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64)] = []
    # The client knows these, and sends null for them. The run is named like its job.
    entity: None = None
    name: None = None


class Integration(Asked):
    """A tracker of the run."""

    type: Literal["wandb"]
    wandb: Wandb


class JobRequest(Asked):
    """A new job."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: str
    validation_file: str | None = None
    suffix: (
        Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")] | None
    ) = None
    seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Integration] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The form of old clients, for supervised jobs."""

    @model_validator(mode="after")
    def _fits(self) -> "JobRequest":
        pairs = self.metadata or {}
        if len(pairs) > MAX_PAIRS or any(
            len(k) > MAX_KEY or len(v) > MAX_VALUE for k, v in pairs.items()
        ):
            raise ValueError(
                f"metadata: expected up to {MAX_PAIRS} pairs with keys of up to {MAX_KEY} and "
                f"values of up to {MAX_VALUE} characters"
            )
        if self.hyperparameters and self.method:
            raise ValueError("hyperparameters: give them within 'method' only")
        if self.integrations and len(self.integrations) > 1:
            raise ValueError("integrations: expected at most one of each type")
        return self

    def resolved_method(self) -> Method:
        """Return the method with its settings, also for a request in the old form."""
        method = self.method or Method(
            type="supervised",
            supervised=Supervised(hyperparameters=self.hyperparameters or Hyperparameters()),
        )
        if method.type == "supervised" and method.supervised is None:
            return method.model_copy(update={"supervised": Supervised()})
        if method.type == "dpo" and method.dpo is None:
            return method.model_copy(update={"dpo": Dpo()})
        return method
