"""Resampling of whole signals and of streams."""

import math

import numpy as np

SAMPLE_RATE = 16000
"""Default sample rate of models, in Hz."""


def ratio(rate, target=SAMPLE_RATE):
    """The ratio of two sample rates in lowest terms, as (up, down).

    Example
    -------
    >>> ratio(44100)
    (160, 441)
    """
    common = math.gcd(rate, target)
    return target // common, rate // common


def resample(samples, rate, target=SAMPLE_RATE):
    """Resample samples (T,); returns the same array if the rates are equal."""
    return samples if rate == target else _resample_poly(samples, *ratio(rate, target))


def _resample_poly(samples, up, down):
    from scipy.signal import resample_poly  # the import takes 0.15 s, and most files do not need it

    return resample_poly(samples, up, down)


class Resampler:
    """Resample a stream. The results together equal those of resampling the whole signal.

    torchaudio's resampler is not used: its kernel takes gigabytes for rates such as 11,127 Hz.

    Arguments
    ---------
    rate : int
        Sample rate of the stream.
    target : int
        Sample rate of the result.

    Example
    -------
    >>> resampler = Resampler(48000)
    >>> [len(resampler.accept(np.zeros(4800, np.float32))) for _ in range(3)], len(resampler.finish())
    ([1589, 1600, 1600], 11)
    """

    def __init__(self, rate, target=SAMPLE_RATE):
        self.up, self.down = ratio(rate, target)
        # Half the length of scipy's filter, rounded up to a multiple of ``down``
        self._context = self.down * math.ceil((10 * max(self.up, self.down) / self.up + 1) / self.down)
        self._samples = np.zeros(self._context, np.float32)

    def position(self, start):
        """The input sample to begin at so that output ``start`` is exact, and the number of surplus outputs before it."""
        first = max(0, start // self.up * self.down - self._context)
        return first, start - first // self.down * self.up

    def accept(self, samples):
        """Add input samples (n,), float32; returns the outputs that are complete."""
        if self.up == self.down:
            return samples
        self._samples = np.concatenate((self._samples, samples))
        ready = (len(self._samples) - 2 * self._context) // self.down * self.down
        return self._resample(ready) if ready > 0 else samples[:0]

    def finish(self):
        """The remaining outputs."""
        if self.up == self.down:
            return self._samples[:0]
        return self._resample(len(self._samples) - self._context)

    def _resample(self, ready):
        x = self._samples[: ready + 2 * self._context]
        y = _resample_poly(x, self.up, self.down)
        self._samples = self._samples[ready:]
        begin = self._context // self.down * self.up
        return y[begin : begin + -(-ready * self.up // self.down)]
