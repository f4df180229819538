"""A training step that fails, for tests; `faults.py kind:rank:epoch:step flags` runs main_deit.py with it."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable

import engine
import main_deit
import utils


def faulty_step(fault: str, train_step: Callable = engine.train_step) -> Callable:
    """engine.train_step, which fails where `fault` says so (kind:rank:epoch:step), unless the job was restarted.

    Kinds: kill, stall, exception, nan (in the images).
    """
    kind, *place = fault.split(':')
    place = [int(number) for number in place]

    def inject_fault(state, net, criterion, batches, *args, **kwargs):
        if [utils.rank(), state.epoch, state.step] == place and not utils.restarts():
            if kind == 'kill':
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == 'stall':
                time.sleep(3600)
            if kind == 'exception':
                raise RuntimeError('injected fault')
            batches = ((images * math.nan, targets) for images, targets in batches)
        return train_step(state, net, criterion, batches, *args, **kwargs)

    return inject_fault


if __name__ == '__main__':
    engine.train_step = faulty_step(sys.argv.pop(1))
    utils.run_script(main_deit.main)
