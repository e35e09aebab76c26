"""How an averaging encodes float32 values for the wire, element by element.

With a lossy codec Q every client, the owner included, averages y_i = Q(x_i), and each client adds back its own coding
error:

    x_i <- sum_j w_ij y_j + (x_i - y_i)

With a doubly stochastic W this preserves the mean of all clients, up to rounding. With the owner's x_i in place of y_i
the mean would move by the mean of (1 - w_ii) (y_i - x_i). Clients that agree in y still differ by their coding errors,
so the distance between them does not fall below about the codec's resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Codec:
    """Codes flat tensors on any device, element by element, because ranks of clients of different sizes exchange parts.

    dtype: of an element on the wire. Coding is rounding to it, unless a codec says otherwise.
    """

    dtype: torch.dtype

    def encode(self, x: Tensor, out: Tensor) -> None:
        """Write what is sent for the float32 `x` to `out`, which has x's shape and `dtype`, on any device."""
        out.copy_(x if x.device == out.device else x.to(out.dtype))  # or a GPU's would be converted on the CPU

    def decode(self, wire: Tensor) -> Tensor:
        """Return the float32 values of `wire`, on its device; may be `wire` itself. What is not finite must stay so."""
        return wire.float()

    @property
    def exact(self) -> bool:
        """Whether the codec is lossless: float32 values are sent as they are."""
        return self.dtype == torch.float32

    @property
    def bytes(self) -> int:
        """Bytes of an element on the wire."""
        return self.dtype.itemsize

    def coded(self, x: Tensor) -> Tensor:
        """Return the float32 values that receivers get for `x`; `x` itself if the codec is lossless."""
        if self.exact:
            return x
        wire = torch.empty_like(x, dtype=self.dtype)
        self.encode(x, wire)
        return self.decode(wire)


class Float32(Codec):
    """Sends the values themselves."""

    dtype = torch.float32


class BFloat16(Codec):
    """Sends the nearest value with 8 bits of mantissa, |y - x| <= 2^-8 |x|, over float32's range, in half the bytes."""

    dtype = torch.bfloat16


CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
}
