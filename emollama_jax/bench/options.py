"""Options of `emollama bench train`, `decode` and `serve`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainSizes:
    """Sizes of the model and the batch; the defaults are a LLaMA of 160 M parameters."""

    width: int = 768
    """width of the residual stream."""
    mlp_width: int = 3072
    """width of the feed-forward layers."""
    layers: int = 12
    """decoder layers."""
    heads: int = 12
    """attention heads."""
    vocab: int = 32000
    """vocabulary size."""
    rank: int = 16
    """LoRA rank, on q, k, v and o."""
    batch: int = 4
    """examples per batch."""
    length: int = 512
    """tokens per example."""
    answer: int | None = None
    """tokens at the end of an example that bear loss; all by default."""

    def parameters(self) -> int:
        """Parameters without adapters."""
        return (
            2 * self.vocab * self.width
            + self.layers * (self._matrices() + 2 * self.width)
            + (self.width)
        )

    def flops(self) -> float:
        """FLOPs of a step's products: forward, and backward to activations and adapters.

        Attention counts what a causal mask leaves; the head counts the tokens that bear loss.
        """
        tokens = self.batch * self.length
        labels = self._labels()
        adapters = self.layers * 4 * 2 * self.width * self.rank
        pairs = self.batch * self.length * (self.length + 1) / 2
        return (
            4.0 * tokens * self.layers * self._matrices()
            + 4.0 * labels * self.width * self.vocab
            + 6.0 * tokens * adapters
            + 12.0 * pairs * self.layers * self.width
        )

    def products(self) -> list[tuple[int, int, int, int]]:
        """(times, m, k, n): [m, k] · [k, n], the frozen products of a forward pass."""
        tokens, width, mlp = self.batch * self.length, self.width, self.mlp_width
        return [
            (4 * self.layers, tokens, width, width),
            (2 * self.layers, tokens, width, mlp),
            (self.layers, tokens, mlp, width),
            (1, self._labels(), width, self.vocab),
        ]

    def _labels(self) -> int:
        """Tokens that bear loss."""
        return self.batch * min(self.length - 1, self.answer or self.length)

    def _matrices(self) -> int:
        """Weights of a layer's matrices."""
        return 4 * self.width**2 + 3 * self.width * self.mlp_width


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Sizes of a decoding call."""

    prompt: int = 128
    """tokens per prompt."""
    new: int = 64
    """tokens per answer; none ends earlier."""


@dataclasses.dataclass(frozen=True)
class ServeSizes:
    """Sizes of the load."""

    requests: int = 64
    """requests that come at once, each about a picture of its own."""
    new: int = 32
    """longest answer in tokens."""
    slots: int = 16
    """slots of the engine, and rows of the other side's batches."""
    loop: int = 16
    """requests of each loop that answers one at a time."""
    rounds: int = 3
    """timed rounds of each measurement, in turns."""
