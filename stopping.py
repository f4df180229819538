"""Stopping all processes after the same step: for a loss that is not finite, or a signal."""

import math
import os
import signal
import threading

import torch
from torch import Tensor

import utils
from utils import InputError


def catch_signals() -> list[int]:
    """A list that receives SIGTERM and SIGINT (Ctrl-C) from now on; a second SIGINT ends the process at once."""
    received = []

    def receive(number: int, _):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if utils.rank() == 0:  # no print here: the signal may interrupt another print
                os.write(2, b'\nstopping after the next step; Ctrl-C again stops at once, without saving\n')

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, receive)
    return received


class StepCheck:
    """Tells all processes, for each step, whether every loss is finite and whether any process was asked to stop.

    On a CPU the answer is read before the update. On a GPU it is read one step later, so that the host never waits for
    the step that it has just queued. One update with a non-finite loss may then happen before all processes stop, so
    `check_last` must be called before a checkpoint is written.
    """

    def __init__(self, device: torch.device):
        self.delayed = device.type == 'cuda'
        self.received = catch_signals()  # signals of this process
        self.stop = False  # whether any process received one; known to all after the same step
        self.pending: tuple[Tensor, torch.cuda.Event | None, str] | None = None

    def check(self, loss: Tensor, place: str):
        """Take the loss of a step; InputError in all processes if that of any process is not finite."""
        self.check_last()
        reports, copied = utils.all_gather(torch.stack([loss, torch.full_like(loss, bool(self.received))])), None
        if reports.is_cuda:
            reports = reports.to('cpu', non_blocking=True)  # into pinned memory, without waiting
            copied = torch.cuda.current_stream().record_event()
        self.pending = reports, copied, place
        if not self.delayed:
            self.check_last()

    def check_last(self):
        """Read the answer for the last step, if it is still unread."""
        if self.pending is None:
            return
        (reports, copied, place), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        losses, asked = reports.T.tolist()  # (processes, 2)
        self.stop = self.stop or any(asked)
        for rank, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise InputError(
                    f'the loss of rank {rank} is {loss} {place}; training stops, and checkpoints are not affected. '
                    'A lower --lr, --clip-grad 1, or --precision bf16 or fp32 may help'
                )

    def exit_code(self) -> int:
        """The exit code that shells expect of a process ended by a signal."""
        return 128 + (self.received or [signal.SIGTERM])[0]
