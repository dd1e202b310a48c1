"""The tasks that zotune knows, as data: one entry each. Templates and verbalisers follow MeZO (arXiv 2305.17333).

To add a task, add an entry: the prompt as a format string over the row's fields, the option text for each label
(with its leading space when the prompt does not end in one), and where rows come from. ``--data FOLDER`` needs
neither ``hub`` nor ``packaged``.
"""

from collections.abc import Mapping

from zotune.core.errors import ConfigError
from zotune.tasks import vader
from zotune.tasks.task import HubSource, Task

_TASKS = (
    Task(
        name="sst2",
        prompt="{sentence} It was",
        options={0: " terrible", 1: " great"},
        calibration=" It was",
        hub=HubSource("nyu-mll/glue", "sst2"),
        source="Stanford Sentiment Treebank (Socher et al. 2013), binary, as in GLUE",
        licence="not stated by its authors",
        note="single sentences of film reviews; training rows include phrases",
        overlaps=frozenset({"vader_movie"}),
    ),
    Task(
        name="vader_movie",
        prompt="{sentence} It was",
        options={0: " terrible", 1: " great"},
        calibration=" It was",
        packaged=vader.load,
        source="film review snippets with human ratings (Hutto and Gilbert 2014), from vaderSentiment 3.3.2",
        licence="MIT",
        note="the demo data; snippets rated at least 1 away from neutral on a scale of -4 to 4",
        overlaps=frozenset({"sst2"}),
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; there are {', '.join(sorted(TASKS))}.")
    return TASKS[name]
