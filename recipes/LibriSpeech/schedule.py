"""A learning rate schedule for runs whose length is known."""

from speechbrain.nnet.schedulers import NoamScheduler


class LinearDecayScheduler(NoamScheduler):
    """Linear warm-up to the peak, then linear decay to zero at the last step; called and saved as SpeechBrain's NoamScheduler.

    Arguments
    ---------
    lr_initial : float
        The peak.
    n_warmup_steps : int
        Number of steps up to it.
    n_total_steps : int
        Number of steps in all; after it the learning rate stays zero.

    Example
    -------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = LinearDecayScheduler(1.0, n_warmup_steps=2, n_total_steps=6)
    >>> [schedule(optimizer)[1] for _ in range(7)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(self, lr_initial, n_warmup_steps, n_total_steps):
        super().__init__(lr_initial, n_warmup_steps)
        self.n_total_steps = n_total_steps

    def _get_lr_scale(self):
        decay = (self.n_total_steps - self.n_steps) / (self.n_total_steps - self.n_warmup_steps)
        return max(0.0, min(self.n_steps / self.n_warmup_steps, decay))
