"""The tasks that zotune knows, as data: one entry each.

Templates and verbalisers of the eleven tasks from SST-2 to DROP are MeZO's (Malladi et al. 2023, arXiv 2305.17333),
those of WinoGrande and of the tasks without instruction words follow ZO-Bench (Zhang et al. 2024, arXiv 2402.11592);
where an entry's template has another source, its note says so.

To add a task of your own, write a file (docs/tasks.md) or add an entry: the prompt as a template over the row's fields,
the option text for each label (with its leading space when the prompt does not end in one), and where rows come from.
``--data FOLDER`` needs neither ``hub`` nor ``packaged``.
"""

from collections.abc import Mapping

from zotune.core.registry import suggest
from zotune.errors import ConfigError
from zotune.tasks import countdown, forms, vader
from zotune.tasks.task import HubSource, Task
from zotune.tasks.task_file import load_task, names_a_file

YES_NO = {0: "Yes", 1: "No"}
NO_YES = {0: "No", 1: "Yes"}
RTE_LABELS = {"entailment": 0, "not_entailment": 1}
SENTIMENT = {0: " terrible", 1: " great"}
COPA_WORDS = {"question": {"effect": "so", "cause": "because"}}
SUPERGLUE = "research use; see SuperGLUE (Wang et al. 2019)"

_TASKS = (
    Task(
        name="sst2",
        prompt="{sentence:strip} It was",
        options=SENTIMENT,
        calibration=" It was",
        hub=HubSource("nyu-mll/glue", "sst2"),
        source="Stanford Sentiment Treebank (Socher et al. 2013), binary, as in GLUE",
        licence="not stated by its authors",
        note="single sentences of film reviews; training rows include phrases",
        overlaps=frozenset({"vader_movie"}),
    ),
    Task(
        name="sst2_empty",
        prompt="{sentence:strip}",
        options=SENTIMENT,
        hub=HubSource("nyu-mll/glue", "sst2"),
        source="as sst2",
        licence="not stated by its authors",
        note="no instruction words: the option follows the sentence",
        overlaps=frozenset({"vader_movie"}),
    ),
    Task(
        name="vader_movie",
        prompt="{sentence:strip} It was",
        options=SENTIMENT,
        calibration=" It was",
        packaged=vader.load,
        source="film review snippets with human ratings (Hutto and Gilbert 2014), from vaderSentiment 3.3.2",
        licence="MIT",
        note="the demo data; snippets rated at least 1 away from neutral on a scale of -4 to 4",
        overlaps=frozenset({"sst2", "sst2_empty"}),
    ),
    Task(
        name="rte",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        options=YES_NO,
        label_names=RTE_LABELS,
        hub=HubSource("aps/super_glue", "rte"),
        source="Recognizing Textual Entailment 1, 2, 3 and 5, as in SuperGLUE",
        licence=SUPERGLUE,
    ),
    Task(
        name="rte_empty",
        prompt="{premise}\n{hypothesis}\n",
        options=YES_NO,
        label_names=RTE_LABELS,
        hub=HubSource("aps/super_glue", "rte"),
        source="as rte",
        licence=SUPERGLUE,
        note="no instruction words: premise, hypothesis and option, a line each",
    ),
    Task(
        name="cb",
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        options={0: "Yes", 1: "No", 2: "Maybe"},
        label_names={"entailment": 0, "contradiction": 1, "neutral": 2},
        dev_rows=100,
        hub=HubSource("aps/super_glue", "cb"),
        source="CommitmentBank (de Marneffe et al. 2019), as in SuperGLUE",
        licence=SUPERGLUE,
        note="250 training rows, 16 of them neutral",
    ),
    Task(
        name="boolq",
        prompt="{passage} {question:question}\n",
        options={True: "Yes", False: "No"},
        unfold=forms.boolq,
        hub=HubSource("google/boolq"),
        source="BoolQ (Clark et al. 2019)",
        licence="CC BY-SA 3.0",
    ),
    Task(
        name="wsc",
        prompt=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text:lower}" refer to {span1_text}? Yes or No?\n'
        ),
        options=NO_YES,
        unfold=forms.wsc,
        hub=HubSource("aps/super_glue", "wsc.fixed"),
        source="Winograd Schema Challenge (Levesque et al. 2012), as in SuperGLUE",
        licence="CC BY 4.0",
        note="554 training rows: the protocol's 500 for development leave 54",
    ),
    Task(
        name="wic",
        prompt=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
        options=NO_YES,
        hub=HubSource("aps/super_glue", "wic"),
        source="Word in Context (Pilehvar and Camacho-Collados 2019), as in SuperGLUE",
        licence="CC BY-NC 4.0",
    ),
    Task(
        name="multirc",
        prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        options=NO_YES,
        unfold=forms.multirc,
        hub=HubSource("aps/super_glue", "multirc"),
        source="MultiRC (Khashabi et al. 2018), as in SuperGLUE",
        licence=SUPERGLUE,
        note="accuracy over pairs of question and answer",
    ),
    Task(
        name="copa",
        prompt="{premise:no_period} {question} ",
        options=("{choice1:first_lower}", "{choice2:first_lower}"),
        words=COPA_WORDS,
        calibration="{question}",
        dev_rows=100,
        hub=HubSource("aps/super_glue", "copa"),
        source="Choice of Plausible Alternatives (Roemmele et al. 2011), as in SuperGLUE",
        licence="BSD-2-Clause",
    ),
    Task(
        name="copa_empty",
        prompt="{premise:strip} ",
        options=("{choice1}", "{choice2}"),
        dev_rows=100,
        hub=HubSource("aps/super_glue", "copa"),
        source="as copa",
        licence="BSD-2-Clause",
        note="no connective: the two sentences one after the other, so cause and effect are not told apart",
    ),
    Task(
        name="record",
        prompt="{passage:highlights}\n-",
        options=forms.record_options,
        right=forms.record_right,
        fields=("query", "entities", "answers"),
        calibration="-",
        unfold=forms.record,
        hub=HubSource("aps/super_glue", "record"),
        source="ReCoRD (Zhang et al. 2018), as in SuperGLUE",
        licence="text of CNN and Daily Mail, research use",
        note="an option per entity of the passage, several of which may be right",
    ),
    Task(
        name="winogrande",
        prompt="{sentence:before_blank}",
        options=("{option1}{sentence:after_blank}", "{option2}{sentence:after_blank}"),
        label_field="answer",
        label_names={"1": 0, "2": 1, 1: 0, 2: 1},
        dev_rows=100,
        hub=HubSource("allenai/winogrande", "winogrande_m"),
        source="WinoGrande (Sakaguchi et al. 2020), training set M",
        licence="CC BY",
    ),
    Task(
        name="squad",
        prompt=forms.squad_prompt,
        options=(),
        answers=forms.squad_answers,
        fields=("context", "question", "answers"),
        hub=HubSource("rajpurkar/squad"),
        source="SQuAD 1.1 (Rajpurkar et al. 2016)",
        licence="CC BY-SA 4.0",
        note="rows without a title do without its line",
    ),
    Task(
        name="drop",
        prompt="Passage: {passage}\nQuestion: {question:strip}\nAnswer:",
        options=(),
        answers=forms.drop_answers,
        fields=("answers_spans",),
        hub=HubSource("ucinlp/drop"),
        source="DROP (Dua et al. 2019)",
        licence="CC BY-SA 4.0",
        note="scored as MeZO does, token F1 with every span as an answer, which is not the official metric",
    ),
    Task(
        name="agnews",
        prompt="{text:strip}\nTopic:",
        options={0: " World", 1: " Sports", 2: " Business", 3: " Technology"},
        calibration="Topic:",
        hub=HubSource("fancyzhx/ag_news", validation="test"),
        source="AG's news corpus (Zhang et al. 2015)",
        licence="any non-commercial use",
        note="the template is zotune's own; the words are one token each for the usual tokenizers",
    ),
    Task(
        name="trec",
        prompt="{text:strip}\nThe answer is a",
        options={0: " expression", 1: " entity", 2: " description", 3: " human", 4: " location", 5: " number"},
        label_field="coarse_label",
        calibration="The answer is a",
        hub=HubSource("CogComp/trec", validation="test"),
        source="TREC questions, six coarse classes (Li and Roth 2002)",
        licence="not stated by its authors",
        note="the words are those of MeZO's template for RoBERTa ([MASK]: question), put at the end for causal models",
    ),
    Task(
        name="countdown",
        prompt=(
            "Numbers: {nums:list}\nTarget: {target:number}\n"
            "Use every number exactly once, with +, -, * and /, to reach the target.\nAnswer:"
        ),
        options=(),
        answers=forms.countdown_answers,
        fields=("solution",),
        reward=countdown.reward,
        packaged=countdown.load,
        source="made by zotune: rows of nums, target and one solution",
        licence="Apache-2.0, as zotune",
        note="the template is zotune's own; the reward is 1 if solved, 0.1 for an expression of just these numbers",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Return the task of that name, or the one that a file describes: ``my_task.yaml``, ``my_task.py:TASK``.

    Raises:
        ConfigError: there is none, or the file is not one of a task.
    """
    if name in TASKS:
        return TASKS[name]
    if names_a_file(name):
        task = load_task(name)
        if task.name in TASKS:
            raise ConfigError(f"the task of {name} is called {task.name!r} like one of zotune's; give it another name.")
        return task
    raise ConfigError(
        f"there is no task {name!r}; there are {', '.join(sorted(TASKS))}.{suggest(name, TASKS)} "
        "A task of your own is the path of its .yaml, .json or .py file."
    )
