"""What goes over the wire in an averaging: how a float32 value is coded, element by element.

With a codec Q that loses something, what is averaged is y_i = Q(x_i), by its owner too, and what coding took stays at
home:

    x_i <- sum_j w_ij y_j + (x_i - y_i)

With a doubly stochastic W the mean of all clients stays, to rounding. With the own x_i in place of y_i it would move by
the mean of (1 - w_ii) (y_i - x_i). Clients that agree in y differ in what stays at home, so that the distance between
them ends at about the codec's resolution.
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
        """out <- what is sent for the float32 `x`; `out` has its shape and `dtype`, and may be on another device."""
        out.copy_(x)

    def decode(self, wire: Tensor) -> Tensor:
        """Float32, on the device of `wire`; may be `wire` itself. What is not finite stays so."""
        return wire.float()

    @property
    def exact(self) -> bool:
        """Whether nothing is lost, so that float32 values are sent as they are."""
        return self.dtype == torch.float32

    @property
    def bytes(self) -> int:
        """Of an element on the wire."""
        return self.dtype.itemsize

    def coded(self, x: Tensor) -> Tensor:
        """What others decode of `x`; `x` itself if nothing is lost."""
        if self.exact:
            return x
        wire = torch.empty_like(x, dtype=self.dtype)
        self.encode(x, wire)
        return self.decode(wire)


class Float32(Codec):
    """The values themselves."""

    dtype = torch.float32


class BFloat16(Codec):
    """The nearest value with 8 bits of mantissa, |y - x| <= 2^-8 |x|, over float32's range, in half the bytes."""

    dtype = torch.bfloat16


CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
}
