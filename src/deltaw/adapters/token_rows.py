"""Trained rows: W' is W with the rows of some tokens replaced.

PEFT calls the rows `trainable_tokens_delta`, though they take the place of the old ones. Where the
table is that of the output head too, the head holds the same rows and follows.
"""

from typing import ClassVar, cast

from torch import Tensor, nn

from deltaw.adapter import Adapter, TokenRows


class TokenRowsAdapter(Adapter):
    """Hold the rows (n, width) of n tokens of a table, and their ids (n,)."""

    replaces: ClassVar[bool] = True
    token_indices: Tensor

    def __init__(self, rows: Tensor, ids: Tensor, follows: bool) -> None:
        super().__init__()
        self.trainable_tokens_delta = cast(nn.Parameter, rows)
        self.register_buffer("token_indices", ids)
        self.follows = follows

    def merged(self, W: Tensor) -> Tensor:
        """Return W (vocabulary, width) with the rows in their places."""
        return W.index_copy(0, self.token_indices, self.trainable_tokens_delta.to(W.dtype))

    def forward(self) -> TokenRows:  # type: ignore[override]
        """Return the rows; they are read by a call, so that hooks of the adapter take part."""
        return TokenRows(self.token_indices, self.trainable_tokens_delta)

    def extra_repr(self) -> str:
        """Show the number of rows where the model is printed."""
        return f"{len(self.token_indices)} tokens"
