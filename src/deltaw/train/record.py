"""What a run notes about itself in its recipe."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class RecordedScore(BaseModel):
    """What a run scored before its first step."""

    model_config = ConfigDict(extra="forbid")

    primary: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    rows: int


class RecordedRollback(BaseModel):
    """Where a run went wrong, the step it went back to, and the factor on its rates since."""

    model_config = ConfigDict(extra="forbid")

    wrong: int
    to: int
    factor: float
    why: str


class Record(BaseModel):
    """What a run notes about itself, which nobody sets."""

    chosen: dict[str, Any] = {}
    versions: dict[str, str] = {}
    data: dict[str, str] = {}
    base: str | None = None
    tokenizer: str | None = None
    adapters: list[str] = []
    """The digests of the adapters that it began with."""
    reading: str | None = None
    """The digest of how rows of a language model's data become text."""
    labels: list[str] = []
    before: RecordedScore | None = None
    rollbacks: list[RecordedRollback] = []
