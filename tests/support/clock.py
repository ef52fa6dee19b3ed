"""A clock that stands still but where a test lets it go on."""

import torch


class Clock:
    """Stands in for `now` of the benchmarks: seconds that pass only by `wait`, times `pace`."""

    def __init__(self) -> None:
        self.seconds, self.pace = 0.0, 1.0

    def __call__(self, device: torch.device) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += self.pace * seconds
