"""The tasks of the long-context benchmarks, as examples with prompts."""

from __future__ import annotations

from collections.abc import Iterable

from headprof.errors import UsageError
from headprof.evaluation.tasks import babilong, longbench, loogle, ruler
from headprof.evaluation.tasks.example import Example, Task, TaskRequest, cut_middle

__all__ = ["BENCHMARKS", "TASKS", "Example", "Task", "TaskRequest", "cut_middle", "expand"]

TASKS: dict[str, Task] = {task.name: task for module in (longbench, babilong, loogle, ruler) for task in module.TASKS}
"""All tasks by name."""

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "longbench": tuple(task.name for task in longbench.TASKS),
    "babilong": tuple(f"babilong/{name}" for name in babilong.REASONING),
    "loogle": tuple(task.name for task in loogle.TASKS),
    "ruler": tuple(f"ruler/{name}" for name in (*ruler.GENERATED, *ruler.QUESTION_SETS)),
    "ruler-generated": tuple(f"ruler/{name}" for name in ruler.GENERATED),
}
"""The tasks that a benchmark's name stands for."""


def expand(names: Iterable[str]) -> list[str]:
    """Names of tasks, each once, with a benchmark's name replaced by its tasks.

    Raises:
        UsageError: there is no such benchmark, or no such task in it.
    """
    tasks: list[str] = []
    for name in names:
        benchmark, _, rest = name.partition("/")
        if benchmark not in BENCHMARKS:
            raise UsageError(f"There is no benchmark {benchmark!r}: choose among {', '.join(BENCHMARKS)}.")
        if rest and name not in TASKS:
            known = [task.partition("/")[2] for task in TASKS if task.startswith(f"{benchmark}/")]
            raise UsageError(f"There is no task {rest!r} in {benchmark}: choose among {', '.join(known)}.")
        tasks += [name] if rest else BENCHMARKS[benchmark]
    return list(dict.fromkeys(tasks))
